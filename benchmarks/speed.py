"""Measure speed: python benchmarks/speed.py [PART [key=value ...]]; PART --help lists its settings.

A part is the main of a file of its own and writes results/speed_PART.json; without one all of them are measured. What
is compared runs in turns, a figure is the median of several rounds, with the lowest and the highest beside it, and
stands next to the floor that nothing can go below.
"""

import sys

import speed_agreement
import speed_codec
import speed_dataset
import speed_generation
import speed_large
import speed_search
import speed_start
import speed_training

from train.config import launch

PARTS = {
    "agreement": (speed_agreement.main, speed_agreement.AgreementRun),
    "codec": (speed_codec.main, speed_codec.CodecRun),
    "generation": (speed_generation.main, speed_generation.GenerationRun),
    "large": (speed_large.main, speed_large.LargeRun),
    "search": (speed_search.main, speed_search.SearchRun),
    "start": (speed_start.main, speed_start.StartRun),
    # These two keep freed memory from then on, as the programs do that they measure.
    "dataset": (speed_dataset.main, speed_dataset.DatasetRun),
    "training": (speed_training.main, speed_training.TrainingSpeedRun),
}

if __name__ == "__main__":
    usage = f"{__doc__}\nThe parts are {', '.join(PARTS)}."
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(usage)
        sys.exit(0)
    if sys.argv[1:] and sys.argv[1] not in PARTS:
        sys.exit(usage)
    for main, config_class in [PARTS[sys.argv.pop(1)]] if sys.argv[1:] else PARTS.values():
        launch(main, config_class)
