"""Write the README's tables from results/*.json: python benchmarks/tables.py (the tests check that they agree)."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import speed_tables
from recording import ROOT

from tokenizer.pretrained import written_whole
from train.counting import told_usage

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def tokenizer_row(result: dict[str, Any]) -> dict[str, str]:
    """The cells of a tokenizer's recorded run, by the column's title."""
    metrics = result["metrics"]
    return {
        "command": f"`{result['command']}`",
        "validation PSNR": f"{metrics['psnr']:.2f} dB",
        "codes in use": told_usage(metrics),
        "perplexity": f"{metrics['perplexity']:.0f}",
        "bits per pixel": f"{metrics['bits_per_pixel']:.3f}",
        "time": f"{result['seconds'] / 60:.1f} min",
        "on": hardware(result),
    }


def vae_row(result: dict[str, Any]) -> dict[str, str]:
    """The cells of a VAE's recorded run, by the column's title; of several levels the decoder's first."""
    metrics = result["metrics"]
    levels = [key.removeprefix("active_units") for key in metrics if key.startswith("active_units_level")] or [""]
    active = [f"{metrics[f'active_units{each}']} of {metrics[f'num_units{each}']}" for each in levels]
    paper, when = POSTERIOR_PAPERS["ladder" if len(levels) > 1 else "gaussian"]
    return {
        "command": f"`{result['command']}`",
        "paper": paper,
        "when to choose it": when,
        "ELBO, nats per dimension": f"{metrics['elbo_nats_per_dimension']:.3f}",
        "bits per dimension": f"{metrics['total_bits_per_dimension']:.3f}",
        "of these KL": f"{metrics['rate_bits_per_dimension']:.3f}",
        "KL, nats per crop": " + ".join(f"{metrics[f'kl_nats{each}']:.1f}" for each in levels),
        "active units": " + ".join(active),
        "PSNR of the mean's reconstruction": f"{metrics['psnr']:.2f} dB",
        "time": f"{result['seconds'] / 60:.1f} min",
        "on": hardware(result),
    }


def prior_row(result: dict[str, Any]) -> dict[str, str]:
    """The cells of a prior's recorded run, by the column's title."""
    metrics = result["metrics"]
    bits, unigram = metrics["bits_per_token"], metrics["unigram_bits_per_token"]
    return {
        "command": f"`{result['command']}`",
        "validation bits per token": f"{bits:.3f}",
        "of training tokens": f"{metrics['train_bits_per_token']:.3f}",
        "unigram code": f"{unigram:.3f}",
        "saved": f"{1 - bits / unigram:.0%}",
        "validation's own entropy": f"{metrics['validation_entropy']:.3f}",
        "bits per dimension": f"{metrics['bits_per_dimension']:.3f}",
        "time": f"{result['seconds'] / 60:.1f} min",
        "on": hardware(result),
    }


def store_row(result: dict[str, Any]) -> dict[str, str]:
    """The cells of a token store's recorded writing, by the column's title."""
    metrics = result["metrics"]
    rows = ", ".join(f"{count:,} {split}" for split, count in metrics["num_rows"].items())
    return {
        "command": f"`{result['command']}`",
        "rows": rows,
        "tokens a row": str(metrics["tokens_per_image"]),
        "time": f"{result['seconds'] / 60:.1f} min",
        "on": hardware(result),
    }


def generation_row(result: dict[str, Any]) -> dict[str, str]:
    """The cells of a recorded measurement of a prior's samples, by the column's title."""
    recognised, score = result["recognised"], result["classification_accuracy_score"]
    return {
        "command": f"`{result['command']}`",
        "recognised": f"{recognised['share']:.1%} ({recognised['low']:.1%} to {recognised['high']:.1%})",
        "classification accuracy score": f"{score['samples']:.1%}",
        "of as many real pictures": f"{score['real']:.1%}",
        "nearest training picture, against unseen ones": f"{result['neighbours']['ratio_to_test_reconstructions']:.2f}",
        "samples/s": f"{result['samples_per_second']:.0f}",
        "on": hardware(result),
    }


def reconstruction_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of each tokenizer of a recorded comparison, by the column's title, and of the codecs at its bits.

    Of a codec that cannot make files so small, its smallest ones stand at the end.
    """
    protocol = result["protocol"]
    settings, images = protocol["settings"], protocol["images"]
    pictures = f"{images:,} of {settings['data']} {protocol['split']}, {settings['image_size']} px"
    tokenizers = [row for row in result["rows"] if "quality" not in row]
    rows, too_large = [], set()
    for row in tokenizers:
        bits, network = row["bits_per_pixel"], row.get("lpips", {}).get("network")
        rows.append(reconstruction_cells(row["name"], bits, row, network, pictures))
        for codec, means in row["codecs_at_the_same_bits"].items():
            if means is None:
                too_large.add(codec)
            else:
                measured = {measure: {"mean": mean} for measure, mean in means.items()}
                rows.append(reconstruction_cells(f"{codec} at those bits", bits, measured, network, pictures))
    for codec in sorted(too_large):
        files = [row for row in result["rows"] if "quality" in row and row["name"] == codec]
        row = min(files, key=lambda row: row["bits_per_pixel"])
        name = f"{codec} at its fewest bits"
        rows.append(reconstruction_cells(name, row["bits_per_pixel"], row, network, pictures))
    return rows


def reconstruction_cells(
    name: str, bits: float, measured: dict[str, Any], lpips_network: str | None, pictures: str
) -> dict[str, str]:
    """One line of the comparison, with half of each interval."""
    cells = {"what": name, "bits per pixel": f"{bits:.3f}"}
    for measure, (title, digits) in MEASURES.items():
        found = measured.get(measure)
        cells[title] = cell(found, digits) if found else "-"
    if "lpips" in measured:
        seen = {True: ", trained on", "unknown": ", perhaps trained on"}.get(measured["lpips"].get("trained_on"), "")
        cells["LPIPS"] += f" ({lpips_network}{seen})"
    return cells | {"pictures": pictures}


def cell(found: dict[str, float], digits: str) -> str:
    """A mean, and half of its interval where it has one."""
    spread = f" ± {digits.format((found['high'] - found['low']) / 2)}" if "low" in found else ""
    return digits.format(found["mean"]) + spread


def reference_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of each model of a recorded comparison with the reference, by the column's title; means over seeds."""
    rows = []
    for model in result["models"]:
        runs = model["runs"]
        means = means_over(runs)
        spread = "" if model["deviation"] is None else f" ± {model['deviation']:.4f}"
        rows.append(
            {
                "model": model["model"].replace("reference", "the example", 1)
                if model["model"].startswith("reference")
                else f"`train/vqvae.py {model['model']}`",
                "test NMSE": f"{model['test_nmse']:.4f}{spread}",
                "under the first": f"{model['under_the_first']:.1%}" if rows else "-",
                "test PSNR": f"{means['test_psnr']:.2f} dB",
                "codes in use": told_usage(means),
                "perplexity": f"{means['perplexity']:.0f}",
                "parameters": f"{runs[0]['parameters']:,}",
                "seeds": str(len(runs)),
                "time": f"{means['seconds'] / 60:.1f} min",
                "on": hardware(runs[0]["made_with"]),
            }
        )
    return rows


def means_over(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over seeds of every figure that is a number."""
    return {key: mean(run[key] for run in runs) for key, value in runs[0].items() if isinstance(value, int | float)}


def quantizers_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of each bottleneck of a recorded comparison, by the column's title; means over seeds."""
    shared, rows = result["protocol"]["settings"]["shared"], []
    for model in result["models"]:
        runs = model["runs"]
        means = means_over(runs)
        paper, when = BOTTLENECKS[runs[0]["quantizer"]]
        spread = "" if model["deviation"] is None else f" ± {model['deviation']:.4f}"
        rows.append(
            {
                "bottleneck": f"`{model['model'].removeprefix(shared).strip()}`",
                "paper": paper,
                "tokens": TOKEN_SHAPES.get(runs[0]["quantizer"], "(B, h, w)"),
                "when to choose it": when,
                "test NMSE": f"{model['test_nmse']:.4f}{spread}",
                "test PSNR": f"{means['test_psnr']:.2f} dB",
                "codes in use": told_usage(means),
                "perplexity": f"{means['perplexity']:.0f}",
                "tokens per code": f"{means['tokens_per_code']:.3g}",
                "bits per image": f"{means['bits_per_image']:.0f}",
                "parameters": f"{runs[0]['parameters']:,}",
                "steps/s": f"{means['steps_per_second']:.1f}",
                "peak memory": f"{means['peak_memory'] / 2**20:.0f} MiB",
                "seeds": str(len(runs)),
                "on": hardware(runs[0]["made_with"]),
            }
        )
    return rows


def many_codes_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of each bottleneck with very many codes: how many it uses, and its memory beside that of N x K."""
    shared, rows = result["protocol"]["settings"]["shared"], []
    for model in result["models"]:
        (run,) = model["runs"]
        crops = run["training_crops"]
        rows.append(
            {
                "bottleneck": f"`{model['model'].removeprefix(shared).strip()}`",
                "codes in use, training crops": told_usage(crops),
                "tokens per code": f"{crops['tokens_per_code']:.3g}",
                "perplexity": f"{crops['perplexity']:,.0f}",
                "test NMSE": f"{model['test_nmse']:.4f}",
                "test PSNR": f"{run['test_psnr']:.2f} dB",
                "steps/s": f"{run['steps_per_second']:.1f}",
                "peak memory of the whole run": f"{run['peak_memory'] / 2**20:,.0f} MiB",
                "a batch's scores against all codes": f"{run['memory_of_scores'] / 2**20:,.0f} MiB",
                "on": hardware(run["made_with"]),
            }
        )
    return rows


def ablation_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of each model of a recorded ablation: what it has other than the first one, and what that changed."""
    first = result["models"][0]
    rows = []
    for model in result["models"]:
        changed = [word for word in model["model"].split() if word not in first["model"].split()]
        perplexity, seconds = (mean(run[key] for run in model["runs"]) for key in ("perplexity", "seconds"))
        rows.append(
            {
                "changed": f"`{' '.join(changed)}`" if changed else f"nothing: `{model['model']}`",
                "test NMSE": f"{model['test_nmse']:.4f}",
                "against the first": f"{model['test_nmse'] / first['test_nmse'] - 1:+.1%}" if rows else "-",
                "perplexity": f"{perplexity:.0f}",
                "parameters": f"{model['runs'][0]['parameters']:,}",
                "time": f"{seconds / 60:.1f} min",
            }
        )
    return rows


def hardware(result: dict[str, Any]) -> str:
    """What the figures were measured on."""
    if result["device"] != "cpu":
        return result["device"]
    threads = result["threads"]
    return f"{threads} core{'s' if threads > 1 else ''} of {result['processor']}"


def table(program: str) -> str:
    """A row per record of a program, the shortest command first, which is the default; nothing where there is none."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if program_of(path) == program]
    results = sorted((json.loads(path.read_text()) for path in paths), key=lambda result: len(result["command"]))
    made = [ROWS[program](result) for result in results]
    rows = [row for each in made for row in (each if isinstance(each, list) else [each])]
    return markdown(rows) if rows else ""


def program_of(path: Path) -> str | None:
    """The longest name in ROWS that a record's name begins with, or is."""
    return max((name for name in ROWS if f"{path.stem}_".startswith(f"{name}_")), key=len, default=None)


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows that share their columns, without those that are empty in every row."""
    titles = [title for title in rows[0] if any(row[title] != "-" for row in rows)]
    lines = [titles, ["---"] * len(titles), *([row[title] for title in titles] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("| --- ", "|---")


def with_tables(readme: str) -> str:
    """The README's text with its tables as the results have them; ValueError where a table has no place."""
    for program in ROWS:
        rows = table(program)
        begin, end = f"<!-- {program} results, by benchmarks/tables.py -->", f"<!-- end of {program} results -->"
        if rows and not (begin in readme and end in readme):
            raise ValueError(
                f"README.md has no place for the {program} table; put {begin} and {end} on their own lines"
            )
        if rows:
            before, _, rest = readme.partition(begin)
            _, _, after = rest.partition(end)
            readme = f"{before}{begin}\n{rows}\n{end}{after}"
    return readme


MEASURES = {
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "kernel_inception_v3": ("kernel distance, Inception", "{:.5f}"),
    "frechet_mobilenet_v2": ("Frechet distance, MobileNetV2", "{:.3f}"),
    "kernel_mobilenet_v2": ("kernel distance, MobileNetV2", "{:.5f}"),
}

BOTTLENECKS = {  # of each member of QUANTIZERS the paper, and when to choose it
    "ema_vq": (
        "[van den Oord et al. 2017](https://arxiv.org/abs/1711.00937)",
        "the default: any number of codes up to some ten thousand, each kept in use",
    ),
    "vq": (
        "[van den Oord et al. 2017](https://arxiv.org/abs/1711.00937)",
        "where the codes must learn by the optimizer, as in published VQGANs",
    ),
    "simvq": (
        "[Zhu et al. 2024](https://arxiv.org/abs/2411.02038)",
        "very many explicit codes: all move as one, so that none is left behind",
    ),
    "softmax_vq": (
        "[Bengio et al. 2013](https://arxiv.org/abs/1308.3432)",
        "where the gradient should know of the other codes: softmax backward, hard forward",
    ),
    "gumbel_vq": (
        "[Jang et al. 2017](https://arxiv.org/abs/1611.01144), [Ramesh et al. 2021](https://arxiv.org/abs/2102.12092)",
        "a distribution over codes and its KL, as in dVAE; long runs, for the annealing",
    ),
    "ibq": (
        "[Shi et al. 2024](https://arxiv.org/abs/2412.02692)",
        "very many codes of many components, each moved by every latent; needs long runs",
    ),
    "fsq": (
        "[Mentzer et al. 2023](https://arxiv.org/abs/2309.15505)",
        "no loss to weigh and no code to lose; levels whose product is the vocabulary",
    ),
    "lfq": (
        "[Yu et al. 2023](https://arxiv.org/abs/2310.05737)",
        "very many codes, as bits: the entropy losses keep them in use and must be weighed against the others",
    ),
    "bsq": (
        "[Zhao et al. 2024](https://arxiv.org/abs/2406.07548)",
        "as lfq, where codes are to stay near their latents, which lie on the unit sphere",
    ),
    "residual": (
        "[Lee et al. 2022](https://arxiv.org/abs/2203.01941)",
        "several small codebooks in place of a huge one; tokens that decode coarse to fine",
    ),
    "grouped": (
        "[Jegou et al. 2011](https://inria.hal.science/inria-00514462)",
        "several small codebooks side by side, none depending on another",
    ),
    "multiscale": (
        "[Tian et al. 2024](https://arxiv.org/abs/2404.02905)",
        "a pyramid of grids for priors that predict scale after scale",
    ),
    "hierarchical": (
        "[Razavi et al. 2019](https://arxiv.org/abs/1906.00446)",
        "a quarter more tokens, which come first: a coarse grid, and the fine one given it",
    ),
}

TOKEN_SHAPES = {"residual": "(B, h, w, q)", "grouped": "(B, h, w, q)", "multiscale": "(B, L)", "hierarchical": "(B, L)"}

POSTERIOR_PAPERS = {  # of each member of POSTERIORS the paper, and when to choose it
    "gaussian": (
        "[Kingma and Welling 2013](https://arxiv.org/abs/1312.6114)",
        "smooth latents to move in or to diffuse, and a likelihood",
    ),
    "ladder": (
        "[Sonderby et al. 2016](https://arxiv.org/abs/1602.02282)",
        "the same in levels, coarse ones above fine ones",
    ),
}

ROWS = {
    "vqvae": tokenizer_row,
    "vae": vae_row,
    "encode_dataset": store_row,
    "token_prior": prior_row,
    "generation": generation_row,
    "reconstruction": reconstruction_rows,
    "reference_vqvae": reference_rows,
    "reference_vqvae_ablation": ablation_rows,
    "quantizers": quantizers_rows,
    "quantizers_many_codes": many_codes_rows,
    "speed_agreement": speed_tables.agreement_rows,
    "speed_avx2": speed_tables.lesser_rows,
    "speed_codec": speed_tables.codec_rows,
    "speed_codec_kept_memory": speed_tables.codec_rows,
    "speed_dataset": speed_tables.dataset_rows,
    "speed_generation": speed_tables.generation_rows,
    "speed_large": speed_tables.large_rows,
    "speed_search": speed_tables.search_rows,
    "speed_start": speed_tables.start_rows,
    "speed_training": speed_tables.training_rows,
}

if __name__ == "__main__":
    text = with_tables(README.read_text())
    with written_whole(README) as part:
        part.write_text(text)
