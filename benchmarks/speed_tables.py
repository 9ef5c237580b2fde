"""The README's tables of speed: the cells of what benchmarks/speed.py has recorded, by the column's title."""

from typing import Any

LUCIDRAINS = "vector-quantize-pytorch"


def search_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each size of codebook."""
    rows = []
    for row in result["rows"]:
        search, training, floor = row["search"], row["training"], row["floor"]
        rows.append(
            {
                "codes": f"{row['codebook_size']:,}",
                "components": str(row["codebook_dim"]),
                "vectors/s": f"{search['ours']['vectors_per_second']['median']:,.0f}",
                "against diffusers": times(search["diffusers"]["ours_is_faster"]),
                "against vector-quantize-pytorch": times(search[LUCIDRAINS]["ours_is_faster"]),
                "search alone against the bare product": times(floor["product"]["ours_is_faster"]),
                "peak memory: ours, diffusers, vector-quantize-pytorch (MiB)": ", ".join(
                    mebibytes(search[name]["peak_memory"]) for name in ("ours", "diffusers", LUCIDRAINS)
                ),
                "training, vectors/s": f"{training['ours']['vectors_per_second']['median']:,.0f}",
                "training against diffusers": times(training["diffusers"]["ours_is_faster"]),
                "training against vector-quantize-pytorch": times(training[LUCIDRAINS]["ours_is_faster"]),
            }
        )
    return rows


def codec_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of encoding and one of decoding for each size of pictures."""
    rows = []
    for row in result["rows"]:
        for part in ("encode", "decode"):
            measured = row[part]
            each = measured["each"]
            rows.append(
                {
                    "what": part,
                    "pictures": f"{row['batch']} of {row['image_size']} px",
                    "float32, images/s": f"{each['ours']['images_per_second']['median']:.3g}",
                    "against diffusers in float32": times(measured["float32"]),
                    "bfloat16, images/s": f"{each['ours, bfloat16']['images_per_second']['median']:.3g}",
                    "against diffusers at its best": f"{times(measured['fastest'])} ({measured['fastest']['peer']})",
                }
            )
    return rows


def times(speedup: dict[str, float]) -> str:
    """How many times as fast, the median of the rounds with the lowest and the highest."""
    return f"{speedup['median']:.2g}x ({speedup['low']:.2g} to {speedup['high']:.2g})"


def mebibytes(memory: int | None) -> str:
    """Of a system that does not tell, a dash."""
    return "-" if memory is None else f"{memory / 2**20:,.0f}"
