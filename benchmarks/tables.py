"""Write the README's tables from results/*.json: python benchmarks/tables.py (the tests check that they agree)."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- training results, by benchmarks/tables.py -->", "<!-- end of training results -->"


def training_table() -> str:
    """A row per recorded training run."""
    rows = [
        "| command | validation PSNR | codes in use | perplexity | bits per pixel | time | on |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("training_*.json")):
        result = json.loads(path.read_text())
        metrics, minutes = result["metrics"], result["seconds"] / 60
        codes = f"{metrics['usage']:.1%} | {metrics['perplexity']:.0f}"
        hardware = (
            f"{result['threads']} cores of {result['processor']}" if result["device"] == "cpu" else result["device"]
        )
        rows.append(
            f"| `{result['command']}` | {metrics['psnr']:.2f} dB | {codes} "
            f"| {metrics['bits_per_pixel']:.3f} | {minutes:.1f} min | {hardware} |"
        )
    return "\n".join(rows)


def with_tables(readme: str) -> str:
    """The README's text with its tables as the results have them."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{training_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
