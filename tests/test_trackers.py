"""What a tracker is told: the figures of metrics.jsonl, at their steps."""

import pytest
from processes import records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import train_here

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_tensorboard_gets_every_figure_of_metrics_jsonl(picture_folder, tmp_path):
    train_here(picture_folder, tmp_path / "run", "log_with=tensorboard", "steps=4", "eval_every=2", "save_every=4")
    told = {}
    for file in (tmp_path / "run").rglob("events.out.tfevents.*"):  # one of figures, one of settings
        events = EventAccumulator(str(file)).Reload()
        told |= {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    lines = records(tmp_path / "run")
    written = {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}
    assert {("loss", 4), ("psnr", 2), ("psnr", 4)} <= written.keys()
    assert told.keys() >= written.keys()
    assert {key: told[key] for key in written} == pytest.approx(written, rel=1e-5)
