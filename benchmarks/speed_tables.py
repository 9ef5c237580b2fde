"""The README's tables of speed: the cells of what benchmarks/speed.py has recorded, by the column's title."""

from typing import Any

FLOORS = "of what arithmetic, memory allow"
LUCIDRAINS = "vector-quantize-pytorch"


def search_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each size of codebook."""
    rows = []
    for row in result["rows"]:
        search, training, alone = row["search"], row["training"], row["alone"]
        rows.append(
            {
                "codes": f"{row['codebook_size']:,}",
                "components": str(row["codebook_dim"]),
                "vectors/s": f"{search['ours']['vectors_per_second']['median']:,.0f}",
                "against diffusers": times(search["diffusers"]["ours_is_faster"]),
                "against vector-quantize-pytorch": times(search[LUCIDRAINS]["ours_is_faster"]),
                "search alone against the bare product": times(alone["product"]["ours_is_faster"]),
                FLOORS: of_floors(alone["ours"]["vectors_per_second"], row["floor_vectors_per_second"]),
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
    """A line of encoding and one of decoding for each model."""
    rows = []
    for row in result["rows"]:
        for part in ("encode", "decode"):
            measured = row[part]
            each = measured["each"]
            rows.append(
                {
                    "parameters": f"{row['parameters'] / 1e6:.0f}M",
                    "what": f"{part} {row['batch']} of {row['image_size']} px",
                    "float32, images/s": f"{each['ours']['images_per_second']['median']:.3g}",
                    "against diffusers in float32": times(measured["float32"]),
                    "fast, images/s": f"{each['ours, fast']['images_per_second']['median']:.3g}",
                    "against diffusers at its best": f"{times(measured['fastest'])} ({measured['fastest']['peer']})",
                    "against diffusers as documented": times(measured["documented"]),
                    "bfloat16 throughout, against its best": times(measured["bfloat16"]),
                    **{
                        f"{FLOORS}: {mode}": of_floors(ours["images_per_second"], ours["floor_images_per_second"])
                        for mode, ours in (("float32", each["ours"]), ("fast", each["ours, fast"]))
                    },
                }
            )
    return rows


def agreement_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each tokenizer."""
    return [
        {
            "parameters": f"{row['parameters'] / 1e6:.1f}M",
            "codes": f"{row['codes']:,}",
            "photographs": f"{row['images']} of {result['settings']['image_size']} px",
            "tokens that agree: fast, bfloat16 throughout, float64": ", ".join(
                f"{row[name]['tokens_that_agree']:.2%}" for name in ("fast", "bfloat16", "float64")
            ),
            "pixels of the same tokens differ by: fast, bfloat16 (levels of 256)": ", ".join(
                f"{row[name]['difference_of_pixels']:.2f}" for name in ("fast", "bfloat16")
            ),
            "and from the photographs by": f"{row['difference_from_photographs']:.1f}",
        }
        for row in result["rows"]
    ]


def generation_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each grid, type and batch."""
    rows = []
    for row in result["rows"]:
        each = row["each"]
        rate = each["ours"]["tokens_per_second"]["median"]
        rows.append(
            {
                "grids": f"{row['batch']} of {row['grid_side']} x {row['grid_side']}",
                "type": row["dtype"],
                "tokens/s": f"{rate:,.0f}",
                "against Llama in transformers": f"{times(row['against_peer'])} ({row['against_peer']['peer']})",
                "guidance takes": times(row["cost_of_guidance"]),
                FLOORS: of_floors(each["ours"]["tokens_per_second"], row["floor_tokens_per_second"]),
                "peak memory: ours, the peer (MiB)": ", ".join(
                    mebibytes(each[name]["peak_memory"]) for name in ("ours", row["against_peer"]["peer"])
                ),
            }
        )
    return rows


def large_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each picture as a whole and in tiles."""
    rows = []
    for row in result["rows"]:
        encode, decode = row["encode"], row["decode"]
        tiles = f"{row['tile_size']} px, sharing {row['tile_overlap']}" if "tile_size" in row else "the whole"
        compared = "tokens_that_differ" in row
        rows.append(
            {
                "picture": f"{row['image_size']} px a side",
                "tiles": tiles,
                "encode": told_seconds(encode["seconds"]),
                "decode": told_seconds(decode["seconds"]),
                "peak memory: encode, decode (MiB)": ", ".join(
                    mebibytes(part["peak_memory"]) for part in (encode, decode)
                ),
                "of that the picture (MiB)": mebibytes(row["picture_bytes"]),
                "tokens that differ": f"{row['tokens_that_differ']:.1%}" if compared else "-",
                "error at seams, elsewhere (levels of 256)": (
                    f"{row['error_at_seams']:.2f}, {row['error_elsewhere']:.2f}" if compared else "-"
                ),
                "error of coding itself": f"{row['error_of_coding']:.2f}" if compared else "-",
            }
        )
    return rows


def start_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of ours, of the peer, and of reading the weights alone."""
    return [
        {
            "what": name,
            "import torch": told_seconds(each["import_torch"]),
            "import the library": told_seconds(each["import_library"]),
            f"load {result['parameters'] / 1e6:.0f} million parameters": told_seconds(each["load"]),
            "beyond torch": told_seconds(each["beyond_torch"]),
            "ours is faster": "-" if name == "ours" else times(each["ours_is_faster"]),
        }
        for name, each in result["each"].items()
    ]


def training_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line of each model: its speed beside the peer's, what bounds it, and where its time goes."""
    rows = []
    for row in result["rows"]:
        speeds = row["images_per_second"]
        rows.append(
            {
                "`train/vqvae.py`": f"`{row['model']}`",
                "batch": f"{row['batch']} of {row['image_size']} px",
                "images/s": f"{speeds['ours']['median']:,.3g}",
                "against the plain loop in float32": times(row["float32"]),
                "against its best": f"{times(row['fastest'])} ({row['fastest']['peer']})",
                FLOORS: of_floors(speeds["ours"], row["floor_images_per_second"]),
                "loader alone, images/s": f"{row['loader_images_per_second']['median']:,.3g}",
                "share of time": ", ".join(f"{part} {share:.0%}" for part, share in row["shares_of_time"].items()),
            }
        )
    return rows


def dataset_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """One line: what of the tokenizer's speed is left of a whole data set, and what a second rank adds."""
    settings, speeds = result["settings"], result["images_per_second"]
    share, several = result["share_of_encode_alone"], f"{settings['ranks']} ranks"
    cells = {
        "pictures": f"{settings['image_size']} px, a tokenizer of {result['parameters'] / 1e6:.0f}M",
        "threads of a rank": str(settings["threads"]),
        "cores": str(result["cores"]),
        "encode alone, images/s": f"{speeds['encode alone']['median']:.3g}",
        "JPEG to parquet, images/s": f"{speeds['1 rank']['median']:.3g}",
        "share": f"{share['median']:.0%} ({share['low']:.0%} to {share['high']:.0%})",
        f"{several}, images/s": f"{speeds[several]['median']:.3g}",
        "against one": times(result["ranks_against_one"]),
    }
    return [cells]


def lesser_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """In short, of a processor without AVX-512, the parts that have a peer with the same network."""
    rows: list[tuple[str, ...]] = []
    match result["command"].split()[2]:
        case "codec":
            for cells in codec_rows(result):
                what, rate = f"{cells['what']}, {cells['parameters']} parameters", cells["float32, images/s"]
                ratios = cells["against diffusers in float32"], cells["against diffusers at its best"]
                rows.append((what, f"{rate} images/s", *ratios))
        case "training":
            for cells in training_rows(result):
                what, rate = f"a step of {cells['`train/vqvae.py`']}, {cells['batch']}", cells["images/s"]
                ratios = cells["against the plain loop in float32"], cells["against its best"]
                rows.append((what, f"{rate} images/s", *ratios))
        case "generation":
            for cells in generation_rows(result):
                what, rate = f"grids: {cells['grids']} tokens, {cells['type']}", cells["tokens/s"]
                rows.append((what, f"{rate} tokens/s", "-", cells["against Llama in transformers"]))
    titles = "what", "ours", "against the peer in float32", "against its best"
    return [dict(zip(titles, row, strict=True)) for row in rows]


def of_floors(speeds: dict[str, float], allowed: dict[str, float]) -> str:
    """What is reached of what each floor allows."""
    return ", ".join(f"{speeds['median'] / allowed[name]:.0%}" for name in ("arithmetic", "memory"))


def told_seconds(seconds: dict[str, float]) -> str:
    """The median of the rounds with the lowest and the highest."""
    return f"{seconds['median']:.2f} s ({seconds['low']:.2f} to {seconds['high']:.2f})"


def times(speedup: dict[str, float] | None) -> str:
    """How many times as fast, the median of the rounds with the lowest and the highest; of what was not, a dash."""
    return "-" if speedup is None else f"{speedup['median']:.2g}x ({speedup['low']:.2g} to {speedup['high']:.2g})"


def mebibytes(memory: int | None) -> str:
    """Of a system that does not tell, a dash."""
    return "-" if memory is None else f"{memory / 2**20:,.0f}"
