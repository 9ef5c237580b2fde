"""The two moments of a program at which it speaks to the Hub: before the work, and with what the work has made."""

import logging
from collections.abc import Callable

from huggingface_hub import HfApi

from .checkpoint import OutputFolder
from .config import RunError, UserError
from .settings import PublishedOutput
from .sources import public_name

log = logging.getLogger(__name__)


def reserve_repository(config: PublishedOutput, data: str, repo_type: str = "model") -> None:
    """Create the repository before the hours of work; UserError where that is not allowed or not possible.

    Or where the card would have to name `data` by a path of this machine.
    """
    repo_id = config.push_to_hub
    if not (config.card.data or public_name(data)):
        raise UserError(f"push_to_hub={repo_id} must come with card.data=..., a name by which others know {data}")
    try:
        HfApi().create_repo(repo_id, repo_type=repo_type, exist_ok=True)
    except Exception as error:  # the client raises a different type for every way in which this can fail
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"push_to_hub={repo_id} cannot be created ({reason}); log in with `hf auth login`") from error


def publish(upload: Callable[[str], str], folder: OutputFolder) -> None:
    """Upload what a program made, `upload` to a repo id; RunError, and nothing lost, where the Hub refuses."""
    repo_id = folder.config.push_to_hub
    try:
        address = upload(repo_id)
    except Exception as error:  # the client raises a different type for every way in which an upload can fail
        raise RunError(
            f"push_to_hub={repo_id}: {' '.join(str(error).split())[:300]}; "
            f"all is safe in {folder.path}, the same command tries again"
        ) from error
    log.info("published: %s", address)
