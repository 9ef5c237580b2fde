"""A class of a table and its hyperparameters, as a mapping: `{name, **hyperparameters}`, complete and checked.

A hyperparameter that is a mapping itself names another class of the same table.
"""

import inspect
from typing import Any

from .pretrained import checked, unknown_key


def complete(part: str, given: dict[str, Any], table: dict[str, type]) -> dict[str, Any]:
    """`{name, **hyperparameters}` with every hyperparameter of the named class, in the order of its signature.

    Raises ValueError for a name that is not in the table, an unknown hyperparameter or a value of another type.
    """
    name = given.get("name")
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{part}.name={name!r} must be one of {', '.join(sorted(table))}")
    known = hyperparameters(table[name])
    for key in given:
        if key not in known and key != "name":
            raise unknown_key(key, known, f"{part} {name!r}")
    values = {
        key: checked(f"{part}.{key}", given.get(key, parameter.default), parameter.annotation)
        for key, parameter in known.items()
    }
    for key, value in values.items():
        if isinstance(value, dict):  # without a name it is of the class that the default names
            values[key] = complete(f"{part}.{key}", {"name": known[key].default["name"]} | value, table)
    return {"name": name} | values


def hyperparameters(choice: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class in a table that a config may set: those with a default that a position can give.

    A keyword-only one is for the model to decide, as the number of the encoder's outputs is.
    """
    signature = inspect.signature(choice).parameters
    return {
        key: parameter
        for key, parameter in signature.items()
        if parameter.default is not parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    }


def build(table: dict[str, type], chosen: dict[str, Any], *arguments: Any, **options: Any) -> Any:
    """The class that a completed mapping names, made with its hyperparameters and what the model decides."""
    chosen = dict(chosen)
    return table[chosen.pop("name")](*arguments, **chosen, **options)
