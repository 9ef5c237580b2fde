"""What the programs of benchmarks/ share: commands that say what was measured, names of records, whole files."""

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import recording
import training
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from processes import run
from recording import command_line, launch_named, public_settings, save_plot
from stopwatch import check_device, each_at_least_one

from train.config import UserError, parse

WORDS = st.text(st.characters(codec="ascii", exclude_categories=("Cc",), exclude_characters="${}\\"), max_size=12)


@dataclass
class MeasuredRun:
    """Settings of benchmarks/measured.py NAME."""

    words: list[str] = field(default_factory=list)
    word: str | None = "a"
    number: float = 1.0


@example("-", ["-"], 1.0)
@given(WORDS.map(str.strip), st.lists(WORDS.map(str.strip), max_size=3), st.floats(1e-9, 1e9))
def test_a_recorded_command_gives_the_program_the_same_settings(word, words, number):
    config = MeasuredRun(words, word, number)
    command = command_line("measured", "name", asdict(config), asdict(MeasuredRun()), ())
    python, program, name, *settings = shlex.split(command)
    assert (python, program, name) == ("python", "benchmarks/measured.py", "name")
    assert parse(MeasuredRun, settings) == config


def test_a_setting_that_is_left_out_is_recorded_as_left_out():
    command = command_line("measured", "name", asdict(MeasuredRun(word=None)), asdict(MeasuredRun()), ())
    assert command.endswith(" name word=null")
    assert parse(MeasuredRun, ["word=null"]).word is None


@dataclass
class OfDataRun(MeasuredRun):
    """Settings of a program that reads data."""

    data: str = "photographs"
    named: str | None = None


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({"data": "/home/me/pictures"}, "pictures"),
        ({"data": "../pictures/"}, "pictures"),
        ({"data": "pictures"}, "pictures"),
        ({"data": "org/pictures"}, "org/pictures"),
        ({"data": "/home/me/pictures", "named": "org/pictures"}, "org/pictures"),
    ],
)
def test_a_record_names_the_data_and_no_folder_that_it_lies_in(given, recorded):
    assert public_settings(OfDataRun(**given)) == {"words": [], "word": "a", "number": 1.0, "data": recorded}


@pytest.mark.parametrize("name", ["a/b", "-x", ".."])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_measured(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measured.py", name])
    with pytest.raises(SystemExit, match=f"NAME '{name}' must be letters"):
        launch_named(print, MeasuredRun, "usage")


@pytest.mark.parametrize(("arguments", "told"), [([], "usage"), (["number=2"], "usage")])
def test_without_a_name_the_usage_is_told(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measured.py", *arguments])
    with pytest.raises(SystemExit, match=told):
        launch_named(print, MeasuredRun, told)


@pytest.mark.parametrize("arguments", [["-h"], ["name", "--help"]])
def test_help_says_what_stands_before_the_settings(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measured.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        launch_named(print, MeasuredRun, "usage")
    assert not ended.value.code
    usage, _, first, *_ = capsys.readouterr().out.splitlines()
    assert usage == "usage: python benchmarks/measured.py NAME [preset.yaml] [key=value ...]"
    assert first.split() == ["words=[]"]


def test_the_name_and_the_settings_reach_the_program(monkeypatch):
    reached = []
    monkeypatch.setattr(sys, "argv", ["measured.py", "mine-2", "number=2"])
    launch_named(lambda *given: reached.append(given), MeasuredRun, "usage")
    assert reached == [("mine-2", MeasuredRun(number=2.0))]


@pytest.mark.parametrize("write", [recording.record, save_plot], ids=["record", "plot"])
def test_what_is_there_stays_where_writing_fails(write, tmp_path, monkeypatch):
    path = tmp_path / "benchmarks/results/mine.json"
    path.parent.mkdir(parents=True)
    path.write_text("before")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    if write is save_plot:
        monkeypatch.setattr(Figure, "savefig", fail)
        given = (path, Figure(), 100)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
        given = ("mine", {"figure": 1}, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        write(*given)
    monkeypatch.undo()
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_the_data_of_a_record_is_hashed_as_a_file_or_a_folder_and_must_be_there(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one").write_bytes(b"one")
    assert training.hash_of_files(str(tmp_path)) == training.hash_of_files(str(tmp_path / "in/one"))
    (tmp_path / "in/two").write_bytes(b"two")
    assert training.hash_of_files(str(tmp_path)) != training.hash_of_files(str(tmp_path / "in/one"))
    with pytest.raises(UserError, match="is no file or folder of files"):
        training.hash_of_files(str(tmp_path / "*"))


def test_a_training_program_that_refuses_its_settings_is_told_of_in_one_line():
    done = run([sys.executable, training.__file__, "mine", "train/vqvae.py", "stepss=3"])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: unknown key 'stepss'")


def test_a_device_that_is_not_there_is_refused():
    check_device("cpu")
    with pytest.raises(ValueError, match=r"device=nowhere cannot be used \(.*\); `cpu`"):
        check_device("nowhere")


@pytest.mark.parametrize("sizes", [[], [4, 0]])
def test_sizes_that_cannot_be_measured_are_refused(sizes):
    @dataclass
    class Sized:
        sizes: list[int]

    each_at_least_one(Sized([1, 2]), "sizes")
    with pytest.raises(ValueError, match="must hold numbers of at least 1, one or more"):
        each_at_least_one(Sized(sizes), "sizes")


def test_a_record_of_the_same_commit_does_not_make_the_next_one_dirty(tmp_path):
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        assert run(["git", *words], cwd=tmp_path).returncode == 0
    files = [tmp_path / "train.py", tmp_path / "benchmarks/results/mine.json", tmp_path / "docs/mine.png"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")
    assert run(["git", "add", "-A"], cwd=tmp_path).returncode == 0
    assert run(["git", "commit", "-qm", "first"], cwd=tmp_path).returncode == 0
    clean = recording.commit(tmp_path)
    assert len(clean) >= 7
    for path in files[1:]:
        path.write_text("second")
    assert recording.commit(tmp_path) == clean
    files[0].write_text("second")
    assert recording.commit(tmp_path) == f"{clean}-dirty"
