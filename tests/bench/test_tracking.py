"""--track: every sitting goes on with one tracked run, whose numbers are those of metrics.jsonl."""

import json
import sys

import pytest

from bench.__main__ import main
from bench.experiments.pool import run_all
from bench.settings.config import resolve
from bench.settings.evaluation import Evaluation
from bench.settings.pool import Pool
from bench.training import tracking
from bench.training.session import Sitting
from bench.training.stopped import Stopped
from bench.training.train import train

from ..helpers.survive import SMALL, difference

TRAIN = ["train", *SMALL, "--epochs", "2", "--batch-size", "400"]
NUMBERS = {"lr", "train_loss", "train_acc", "val_acc", "seconds", "images_per_second"}
AT_THE_END = {"test/natural": "natural", "test/linf-8-255": ("linf", "8/255"),
              "test/l2-128-255": ("l2", "128/255")}  # fmt: skip


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_numbers_of_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [*TRAIN, "--track", "tensorboard", "--save-every", "0", "--out", str(tmp_path)]
    for _ in range(6):
        assert main([*command, "--time-budget", "0"]) == 0
    assert main(command) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows, summary = metrics(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    assert set(board.Tags()["scalars"]) == NUMBERS | AT_THE_END.keys()
    for name in NUMBERS:
        events = board.Scalars(name)
        assert [e.step for e in events] == [0, 1]
        assert [e.value for e in events] == pytest.approx([row[name] for row in rows])
    (natural,) = board.Scalars("test/natural")
    assert natural.step == 2 and natural.value == pytest.approx(summary["natural"])
    (robust,) = board.Scalars("test/linf-8-255")
    assert robust.value == pytest.approx(summary["robust"]["linf"]["8/255"])
    (hparams,) = tmp_path.glob("tensorboard/*/hparams.yml")  # once, not in every sitting
    assert "method: sgd" in hparams.read_text()


class Service:
    """A tracker whose runs stay when it is closed, as a service's do."""

    def __init__(self):
        self.runs, self.configurations, self.down, self.open = {}, {}, False, 0

    def start(self, out, run, epochs):
        run = run or f"run{len(self.runs)}"
        self.runs.setdefault(run, [])
        service = self
        service.open += 1

        class Tracker:
            def store_init_configuration(self, values):
                service.configurations[run] = values

            def log(self, values, step):
                if service.down:
                    raise ConnectionError("the network is down\nat length")
                service.runs[run].append((step, values))

            def finish(self):
                service.open -= 1

        return Tracker(), run


@pytest.fixture
def service(monkeypatch):
    made = Service()
    monkeypatch.setitem(tracking.OPEN, "wandb", made.start)
    monkeypatch.setitem(sys.modules, "wandb", tracking)  # any module
    return made


def tiny(**options):
    options = {"width": 4, "epochs": 3, "batch_size": 400, "threads": 1} | options
    return resolve("sgd", "digits", options)


def epochs_of(rows):
    return [step for step, _ in rows]


def test_every_sitting_goes_on_with_the_same_run(tmp_path, service):
    out = tmp_path / "run"
    for _ in range(2):  # the first epoch of four steps is not over
        with pytest.raises(Stopped):
            train(tiny(), out, sitting=Sitting(time_budget=0, track="wandb"))
    assert service.runs == {"run0": []}
    train(tiny(), out, sitting=Sitting(track="wandb"))
    ((run, rows),) = service.runs.items()
    assert epochs_of(rows) == [0, 1, 2] and service.open == 0
    assert [values for _, values in rows] == [
        {k: row[k] for k in NUMBERS} for row in metrics(out)
    ]  # fmt: skip
    assert service.configurations[run]["method"] == "sgd"
    assert None not in service.configurations[run].values()
    (out / "last.pt").unlink()  # what is trained now is another run
    train(tiny(), out, sitting=Sitting(track="wandb"))
    assert list(map(epochs_of, service.runs.values())) == [[0, 1, 2]] * 2


def test_a_run_that_began_without_a_tracker_is_tracked_from_its_first_epoch(tmp_path, service):
    with pytest.raises(Stopped):
        def stop(row):
            sitting.terminated = row["epoch"] == 1
        sitting = Sitting()  # fmt: skip
        train(tiny(), tmp_path, after_epoch=stop, sitting=sitting)
    train(tiny(), tmp_path, sitting=Sitting(track="wandb"))
    assert list(map(epochs_of, service.runs.values())) == [[0, 1, 2]]


def test_a_network_that_fails_stops_no_training_and_loses_no_epoch(tmp_path, service):
    def up_again(row):
        service.down = row["epoch"] == 0

    with pytest.warns(UserWarning, match="wandb could not be given an epoch .the network is down"):
        train(tiny(), tmp_path / "a", after_epoch=up_again, sitting=Sitting(track="wandb"))
    assert list(map(epochs_of, service.runs.values())) == [[0, 1, 2]]
    train(tiny(), tmp_path / "b")
    assert difference(tmp_path / "a", tmp_path / "b") == "files ['tracker.json']"


def test_what_is_not_installed_is_named_with_the_remedy(tmp_path, capsys, monkeypatch):
    for tracker, missing in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"),
                             ("mlflow", "mlflow"), ("trackio", "trackio")):  # fmt: skip
        monkeypatch.setitem(sys.modules, missing, None)
        assert main([*TRAIN, "--track", tracker, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert f"--track {tracker} needs" in error and f"pip install {tracker}" in error
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path / "run")]) == 2
    assert "pip install accelerate" in capsys.readouterr().err
    assert main([*TRAIN, "--track", "wandbd", "--out", str(tmp_path / "run")]) == 2
    assert "wandb" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, capsys, service, monkeypatch):
    def refused(*_):
        raise RuntimeError("no API key\nand more")

    monkeypatch.setitem(tracking.OPEN, "wandb", refused)
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path)]) == 2
    assert "--track wandb could not start (no API key)" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- many runs


EVALUATION = Evaluation((8 / 255,), (), steps=1, samples=20)
AGAIN = Evaluation((4 / 255,), (), steps=1, samples=20)


def made(out, track=None, evaluations=None, **options):
    """Two runs, of SGD and of SAM."""
    evaluations = evaluations or {"summary.json": EVALUATION}
    configs = [resolve(m, "digits", {"width": 4, "epochs": 1, "batch_size": 400, "threads": 1})
               for m in ("sgd", "sam")]  # fmt: skip
    runs = {config.name: (config, evaluations) for config in configs}
    return run_all(runs, out, Pool(track=track, **options))


def tracked_rows(service):
    return [(service.configurations[run]["method"], [sorted(values) for _, values in rows])
            for run, rows in service.runs.items()]  # fmt: skip


EPOCH, END = sorted(NUMBERS), ["test/linf-8-255", "test/natural"]


def test_each_of_many_runs_is_tracked_once(tmp_path, service):
    made(tmp_path, "wandb")
    assert tracked_rows(service) == [("sgd", [EPOCH, END]), ("sam", [EPOCH, END])]
    made(tmp_path, "wandb")
    assert list(map(len, service.runs.values())) == [2, 2] and service.open == 0


def test_finished_runs_are_tracked_from_their_files(tmp_path, service):
    """With a second evaluation, as a study's, which has names of its own."""
    summaries = made(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    both = {"summary.json": EVALUATION, "summary-1.json": AGAIN}
    made(tmp_path, evaluations=both)
    assert service.runs == {}
    made(tmp_path, "wandb", evaluations=both)
    again = ["test-1/linf-4-255", "test-1/natural"]
    assert tracked_rows(service) == [(m, [EPOCH, END, again]) for m in ("sgd", "sam")]
    assert before == {p: p.stat().st_mtime_ns for p in before}, "trained again"
    (natural,) = [v["test/natural"] for _, v in service.runs["run0"] if "test/natural" in v]
    assert natural == summaries["sgd-seed0"][0]["natural"]


def test_a_finished_run_is_tracked_by_train_too(tmp_path, service):
    command = [*TRAIN, "--out", str(tmp_path)]
    for track in ([], ["--track", "wandb"], ["--track", "wandb"]):
        assert main([*command, *track]) == 0
    assert [step for step, _ in service.runs["run0"]] == [0, 1, 2] and len(service.runs) == 1


@pytest.mark.parametrize("fault", ["start", "log"])
def test_a_tracker_that_fails_is_named_and_loses_no_training(fault, tmp_path, service, capsys,
                                                             monkeypatch):  # fmt: skip
    def refused(*_):
        raise RuntimeError("no API key\nand more")

    with monkeypatch.context() as broken:
        if fault == "start":
            broken.setitem(tracking.OPEN, "wandb", refused)
        service.down = fault == "log"
        with pytest.warns(UserWarning, match="wandb.*(no API key|network is down)"):
            assert len(made(tmp_path, "wandb")) == 2
    said = capsys.readouterr().err
    assert "wandb lacks 2 of the 2 runs" in said and "(sgd-seed0, sam-seed0)" in said
    service.down = False
    made(tmp_path, "wandb")
    assert tracked_rows(service) == [("sgd", [EPOCH, END]), ("sam", [EPOCH, END])]
    assert "lacks" not in capsys.readouterr().err


def test_notes_that_are_damaged_are_named_and_lose_no_training(tmp_path, service):
    made(tmp_path, "wandb")
    (tmp_path / "sam-seed0" / "tracker.json").write_text("{")
    with pytest.warns(UserWarning, match="sam-seed0/tracker.json' is damaged.*remove it"):
        assert len(made(tmp_path, "wandb")) == 2


def test_one_that_is_not_installed_is_refused_before_anything_is_trained(tmp_path, capsys,
                                                                         monkeypatch):  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for command in (["compare", "--methods", "sgd"], ["sweep", "--methods", "sgd"],
                    ["study", "trade-off"]):  # fmt: skip
        assert main([*command, "--track", "mlflow", "--out", str(tmp_path / "run")]) == 2
        assert "--track mlflow needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- the services' own local modes


def of_wandb(folder):
    return len({path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")})


def of_mlflow(folder):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"name = '{tracking.PROJECT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [m.step for m in losses] == [0, 1] and "test/natural" in run.data.metrics
    return 1


def of_trackio(folder):
    import sqlite3

    (file,) = (folder / "trackio").glob(f"{tracking.PROJECT}*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics").fetchall()
    steps = [step for _, step, values in rows if "train_loss" in str(values)]
    assert steps == [0, 1]
    return len({run for run, _, _ in rows})


@pytest.mark.long
@pytest.mark.parametrize("tracker, runs", [("wandb", of_wandb), ("mlflow", of_mlflow),
                                           ("trackio", of_trackio)])  # fmt: skip
def test_two_sittings_are_one_run_of_the_service(tracker, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker, reason=f"needs {tracker}: pip install {tracker}")
    command = [*TRAIN, "--track", tracker, "--out", str(tmp_path / "run")]
    assert main([*command, "--time-budget", "0"]) == 0
    assert main(command) == 0
    assert runs(tmp_path) == 1
