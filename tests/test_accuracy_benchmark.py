"""benchmarks/accuracy.py: its readers, its runs and verdicts; and that a data-free method has no way to any data."""

import argparse
import contextlib
import gzip
import inspect
import json
import lzma
import pickle
import struct
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.generator import GENERATORS, SUPPLIED, GeneratorSettings
from vitkd_fast.methods import METHODS
from vitkd_fast.models import image_spec

pytest.importorskip("timm")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import accuracy_data
import accuracy_floors
import accuracy_learning
import accuracy_models
import accuracy_pair
import accuracy_report
import accuracy_runs

ON_DISK = (".py", ".pyc", "METADATA")  # code that is imported late, and what says its version


class TouchedError(AssertionError):
    """Something was read that distillation has no business reading."""


_armed = False


def _watch(event, arguments):
    if not _armed:
        return
    if event == "open":
        path, mode, _ = arguments
        if not (isinstance(path, str | bytes | Path) and str(path).endswith(ON_DISK)) and "w" not in (mode or ""):
            raise TouchedError(f"open {path!r}")
    elif event in ("socket.connect", "subprocess.Popen"):
        raise TouchedError(event)


sys.addaudithook(_watch)  # sees every open(), os.open(), np.load(), whoever calls it; it cannot be taken off again


@contextlib.contextmanager
def no_data():
    """Inside, reading a file, connecting to anything, starting a process or iterating a DataLoader raises."""
    global _armed

    def refuse(*_, **__):
        raise TouchedError("a DataLoader")

    loader = torch.utils.data.DataLoader
    iterate, loader.__iter__, _armed = loader.__iter__, refuse, True
    try:
        yield
    finally:
        loader.__iter__, _armed = iterate, False


def small_vit(embed_dim=16, depth=2):
    with torch.random.fork_rng([]):
        torch.manual_seed(embed_dim)
        return accuracy_models.vit(8, 1, {"patch_size": 4, "embed_dim": embed_dim, "depth": depth, "num_heads": 2})


def test_the_trap_catches_every_way_to_data(tmp_path):
    from sklearn.datasets import load_digits

    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    torch.save({}, tmp_path / "data.pt")
    ways = (
        lambda: np.load(tmp_path / "data.npz"),
        lambda: torch.load(tmp_path / "data.pt"),
        lambda: (tmp_path / "data.npz").read_bytes(),
        lambda: gzip.open(tmp_path / "data.npz"),
        lambda: load_digits(),
        lambda: accuracy_data.read("digits"),
        lambda: accuracy_data.read("mnist", tmp_path / "data.npz"),
        lambda: list(torch.utils.data.DataLoader([1, 2])),
    )
    for way in ways:
        way_name = inspect.getsource(way)
        with no_data(), pytest.raises(TouchedError):
            way()
            pytest.fail(f"got through: {way_name}")
    assert list(torch.utils.data.DataLoader([1, 2])) and len(load_digits().target) == 1797


@pytest.mark.parametrize("method", list(METHODS))
def test_distill_reads_no_data(method):
    options = {"steps": 4, "batch_size": 8, "width": 16, "generator_steps": 2, "student_steps": 2, "progress": False}
    distill(small_vit(), small_vit(8, 1), method=method, **options)  # imports what it imports
    with no_data():
        result = distill(small_vit(), small_vit(8, 1), method=method, **options)
    assert result.report.steps == 4 and result.report.teacher_accuracy is None


def test_no_argument_but_evaluate_takes_images(tmp_path):
    assert list(inspect.signature(distill).parameters) == ["teacher", "student", "evaluate", "options"]
    images = torch.rand(8, 1, 8, 8)
    for field in fields(Config):
        for given in (images, [images], {"images": images}, torch.utils.data.DataLoader(images)):
            with pytest.raises((TypeError, ValueError)):  # all other fields have their defaults
                Config(**{field.name: given})
    torch.save({"images": images}, tmp_path / "images.pt")
    with pytest.raises(ValueError, match="teacher_checkpoint goes with a teacher given by name"):
        distill(small_vit(), small_vit(8, 1), teacher_checkpoint=tmp_path / "images.pt", progress=False)


def test_evaluating_on_digits_changes_no_weight():
    held = accuracy_data.read("digits").test
    batch = (held.pixels(slice(0, 100)) * 2 - 1, held.labels[:100])
    students = []
    for evaluate in (None, [batch]):
        options = {"steps": 5, "batch_size": 8, "width": 16, "progress": False}
        result = distill(small_vit(), small_vit(8, 1), evaluate=evaluate, **options)
        students.append(accuracy_models.digest(result.student))
        assert (result.report.student_accuracy is None) == (evaluate is None)
    assert students[0] == students[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The benchmark, shortened: seeds 0 and 1, 20 teacher steps, 6 student steps; what each distill() was given."""
    folder = tmp_path_factory.mktemp("accuracy")
    asked = ["--seeds", "2", "--methods", "best", "dfad", "--teacher-steps", "20", "--threads", "1"]
    calls = []

    def watched(teacher, student, **options):
        assert "evaluate" not in options and not any(isinstance(value, torch.Tensor) for value in options.values())
        calls.append((accuracy_models.digest(student), options))
        real = options.get("generator") == SUPPLIED
        with contextlib.nullcontext() if real else no_data():
            return distill(teacher, student, **options)

    def run(*more):
        calls.clear()
        patch = pytest.MonkeyPatch()
        patch.setattr(accuracy_learning, "distill", watched)
        try:
            budget = [] if "--seconds" in more else ["--steps", "6"]
            status = accuracy.main([*asked, *budget, "--out", str(folder), "--results", str(folder / "results"), *more])
        finally:
            patch.undo()
        records = sorted((folder / "results").glob("accuracy-digits-*.json"), key=lambda file: file.stat().st_mtime)
        return status, list(calls), json.loads(records[-1].read_text()), folder

    distill(small_vit(), small_vit(8, 1), steps=2, batch_size=8, width=16, progress=False)
    return run, run()


def test_all_contenders_start_alike_and_only_one_sees_images(bench):
    _, (status, calls, record, _) = bench
    assert status == 0 and len(calls) == 2 * 4
    for seed in (0, 1):
        own = [(start, options) for start, options in calls if options["seed"] == seed]
        assert len({start for start, _ in own}) == 1
        assert [options["method"] for _, options in own] == ["best", "noise", "best", "dfad"]
        assert [options.get("generator") for _, options in own] == [SUPPLIED, None, None, None]
        shared = ("steps", "batch_size", "precision")
        assert len({tuple(options[name] for name in shared) for _, options in own}) == 1
    settings = record["settings"]
    for name in ("student_lr", "optimizer", "weight_decay", "clip"):
        assert len({settings[contender][name] for contender in ("real_kd", "noise", "best", "dfad")}) == 1
    assert settings["real_kd"]["student_objectives"] == settings["best"]["student_objectives"]
    assert settings["real_kd"]["student_loss"] == settings["best"]["student_loss"]
    assert calls[0][0] != calls[4][0]


def test_everything_is_reported_and_recorded(bench, capsys):
    _, (_, _, record, folder) = bench
    assert [(row["method"], row["seed"]) for row in record["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("real_labels", "real_kd", "noise", "best", "dfad")
    ]
    for row in record["rows"]:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["agreement"] <= 1 and row["steps"] == 6 and row["seconds"] > 0
    assert record["machine"]["torch"] == torch.__version__ and "commit" in record
    assert len(record["teachers"]) == 2 and record["parameters"]["teacher"] >= 6 * record["parameters"]["student"]
    text = json.dumps(record)
    assert str(folder) not in text and str(Path(accuracy.__file__).parent) not in text
    page = (folder / "accuracy-digits.md").read_text()
    assert all(line in page for line in record["table"]) and len(record["table"]) == 2 + 1 + 5
    assert len({len(line) for line in record["table"]}) == 1
    accuracies = [100 * row["accuracy"] for row in record["rows"] if row["method"] == "dfad"]
    assert f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}" in page
    assert (folder / "samples/digits-best-seed1.png").read_bytes().startswith(b"\x89PNG")
    assert all(line.startswith("floor digits") and "not judged (2 of 3 seeds)" in line for line in record["floors"])


def test_finished_runs_are_kept_until_a_setting_changes(bench, capsys):
    run, (_, _, first, _) = bench
    _, calls, again, _ = run()
    assert calls == [] and again["rows"] == first["rows"]
    assert capsys.readouterr().out.count("(kept)") == 10
    _, calls, _, _ = run("--methods", "dafl", "--seeds", "1")
    assert [options["method"] for _, options in calls] == ["dafl"]
    _, calls, _, _ = run("--methods", "dfad", "--seeds", "1", "--skip", "real_kd", "real_labels", "--steps", "7")
    assert [options["method"] for _, options in calls] == ["noise", "dfad"]
    patch = pytest.MonkeyPatch()
    patch.setitem(METHODS, "dfad", replace(METHODS["dfad"], settings={**METHODS["dfad"].settings, "shift": 0.1}))
    _, calls, _, _ = run("--methods", "dfad", "--seeds", "1")
    patch.undo()
    assert [options["method"] for _, options in calls] == ["dfad"]


def test_a_method_that_fails_is_reported_and_tried_again(bench, monkeypatch, capsys):
    run, _ = bench
    monkeypatch.setitem(METHODS, "zskt", replace(METHODS["zskt"], settings={"generator": "broken"}))
    for _ in range(2):
        status, calls, record, _ = run("--methods", "zskt", "--seeds", "1")
        assert status == 1 and [options["method"] for _, options in calls] == ["zskt"]
        assert "generator is 'broken'" in record["rows"][-1]["error"]
    assert "zskt, seed 0: FAILED, ValueError" in capsys.readouterr().out


def test_equal_time_is_measured_in_whole_rounds_before_the_run():
    asked = []

    def seconds_of(steps):
        asked.append(steps)
        return 1.0 + 0.01 * steps

    assert accuracy_runs.steps_in(100, seconds_of, 400) == round(100 * 400 / 5.0) and asked == [400]
    asked.clear()
    assert accuracy_runs.steps_in(60, lambda steps: asked.append(steps) or 0.01 * steps, 5) == 6000
    assert asked == [10, 20, 40, 80, 160, 320]  # 5 % of 60 s is three seconds


def test_equal_time_ends_in_time(bench):
    run, _ = bench
    skipped = ("--skip", "real_kd", "noise")
    _, calls, record, _ = run("--seconds", "0.5", "--seeds", "1", "--methods", "dfad", *skipped)
    labels, dfad = record["rows"]
    assert {labels["method"], dfad["method"]} == {"real_labels", "dfad"} and calls[-1][1]["steps"] == dfad["steps"]
    for row in record["rows"]:
        assert 0.05 < row["seconds"] < 10  # of 0.5: the machine that tests run on may be busy
    assert any("digits, equal time   not judged: best was not run" in line for line in record["floors"])


def result(**means):
    values = {"seeds": 3, "teacher": 99.0, "seconds": 200.0, "ratio": 6.5}
    values |= {name: means.pop(name) for name in list(means) if name in values}
    return accuracy_floors.Result(methods=means, **values)


def test_floors_are_met_only_by_what_was_measured():
    lines = accuracy_floors.verdicts(["digits"], result(best=98.2, real_kd=98.8))
    assert [line.split(":")[0].split("digits")[1].strip() for line in lines] == ["met", "met", "NOT MET", "met"]
    assert "best 0.60 points below KD on real images, 0.5 allowed" in lines[2]
    assert "not judged: real_kd was not run" in accuracy_floors.verdicts(["digits"], result(best=98.2))[2]
    assert "not judged (2 of 3 seeds)" in accuracy_floors.verdicts(["digits"], result(best=99.0, seeds=2))[0]
    assert "NOT MET" in accuracy_floors.verdicts(["mnist"], result(best=98.39, teacher=98.99))[0]
    assert accuracy_floors.verdicts(["mnist, another teacher"], result(best=1.0)) == []


def test_best_must_be_ahead_of_every_other_method():
    others = {name: 90.0 for name in METHODS if name not in accuracy_floors.OURS}
    (line,) = accuracy_floors.verdicts(["digits, equal time"], result(best=90.1, **others))
    assert "met: best +0.10 points" in line
    (line,) = accuracy_floors.verdicts(["digits, equal time"], result(best=90.1, **{**others, "dafl": 90.1}))
    assert "NOT MET: best +0.00 points from dafl" in line
    del others["dafl"]
    (line,) = accuracy_floors.verdicts(["digits, equal time"], result(best=99.0, **others))
    assert "not judged: dafl was not run" in line


def test_without_matplotlib_there_is_a_message_and_no_plot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in accuracy_report.plot(None, 99.0, {})


def test_with_matplotlib_there_is_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"best": accuracy_report.Outcome("best", [98.0, 98.4], [97.0, 97.5], [9.0, 9.5], [100.0, 101.0])}
    told = accuracy_report.plot(argparse.Namespace(out=tmp_path, data="digits"), 99.0, found)
    assert (tmp_path / "accuracy-digits.png").read_bytes().startswith(b"\x89PNG") and told.startswith("plot: ")


def test_a_given_teacher_is_loaded_strictly_with_its_own_normalisation(tmp_path):
    from safetensors.torch import save_file

    sizes = {"patch_size": 4, "embed_dim": 14, "depth": 1, "num_heads": 2, "final_norm": False}
    model = accuracy_models.vit(8, 1, sizes)
    told = {"img_size": 8, "in_chans": 1, "num_classes": 10, **sizes, "norm_eps": 1e-5, "mean": [0.13], "std": [0.31]}
    (tmp_path / "other.json").write_text(json.dumps(told))
    with pytest.raises(FileNotFoundError, match="no weights beside"):
        accuracy_models.given_teacher(tmp_path / "other.json")
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    given = accuracy_models.given_teacher(tmp_path / "other.json")
    assert accuracy_models.digest(given) == accuracy_models.digest(model) and not given.training
    assert given.blocks[0].norm1.eps == 1e-5
    spec = image_spec(given, Config())
    assert spec.mean == (0.13,) and spec.std == (0.31,)
    pixels = torch.rand(4, 1, 8, 8)
    assert torch.allclose(spec.normalised(pixels), (pixels - 0.13) / 0.31)
    (tmp_path / "other.json").write_text(json.dumps({**told, "depth": 2}))
    with pytest.raises(ValueError, match=r"missing: blocks\.1"):
        accuracy_models.given_teacher(tmp_path / "other.json")


def test_a_given_resnet_may_lack_the_counts_of_its_batchnorms(tmp_path):
    model = accuracy_models.ResNet(8)
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": state, "best_prec1": 93.0}, tmp_path / "resnet.th")
    (tmp_path / "resnet.json").write_text(
        json.dumps({"architecture": "resnet", "depth": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]})
    )
    given = accuracy_models.given_teacher(tmp_path / "resnet.json")
    assert accuracy_models.digest(given) == accuracy_models.digest(model)
    assert image_spec(given, Config()).mean == (0.5, 0.4, 0.3)


def test_resnets_have_the_published_sizes():
    assert accuracy_models.parameters(accuracy_models.ResNet(20)) == 269_722
    assert accuracy_models.parameters(accuracy_models.ResNet(56)) == 853_018


@pytest.mark.parametrize("name", list(accuracy_models.TASKS))
def test_students_are_as_small_as_they_must_be(name):
    task = accuracy_models.TASKS[name]
    teacher, student = (accuracy_models.vit(task.side, task.channels, size) for size in (task.teacher, task.student))
    ratio = accuracy_models.parameters(teacher) / accuracy_models.parameters(student)
    assert ratio >= (4 if name == "cifar10" else 6)


def test_real_images_are_a_generator_inside_and_unknown_outside():
    data = accuracy_data.Labelled(torch.randint(17, (5, 1, 8, 8), dtype=torch.uint8), torch.arange(5), 16)
    spec = image_spec(small_vit(), Config())
    with accuracy_models.real_images(data, accuracy_models.Augmentation()) as name:
        made = GENERATORS[name](spec, GeneratorSettings()).sample(40)
    known = spec.normalised(data.pixels(slice(None))).flatten(1)
    assert torch.cdist(made.flatten(1), known).amin(1).max() < 1e-5
    assert SUPPLIED not in GENERATORS


def test_augmentations_stay_in_range_and_do_what_they_are_called():
    pixels = torch.zeros(64, 3, 16, 16)
    pixels[:, :, 4:12, 2:8] = 0.8
    strong = accuracy_models.Augmentation(rotate=0.3, scale=0.2, shift=0.1, flip=True, colour=0.4, erase=0.5)
    changed = strong(pixels)
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 1
    assert (changed - pixels).abs().amax((1, 2, 3)).min() > 0
    assert torch.equal(accuracy_models.Augmentation()(pixels), pixels)
    mirrored = accuracy_models.Augmentation(flip=True)(pixels)
    flipped = [torch.allclose(one, pixels[0].flip(-1), atol=1e-5) for one in mirrored]
    assert 10 < sum(flipped) < 54
    assert all(flip or torch.allclose(one, pixels[0], atol=1e-5) for flip, one in zip(flipped, mirrored))
    moved = accuracy_models.Augmentation(shift=0.25)(pixels)
    centre = (moved.sum((1, 2)) * torch.arange(16)).sum(1) / moved.sum((1, 2, 3))
    assert 1.5 < centre.max() - centre.min() < 8.1


def test_cutmix_takes_its_share_from_the_neighbour():
    torch.manual_seed(0)
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 10)
    mixed, others, share = accuracy_models.cut_and_mixed(pixels, torch.arange(4))
    assert others.tolist() == [3, 0, 1, 2] and 0 <= share < 1
    assert torch.allclose((mixed == pixels).float().mean((1, 2, 3)), torch.tensor(share))
    assert set(mixed[1].unique().tolist()) <= {0.0, 1.0}


def test_training_on_labels_learns_and_leaves_the_random_state():
    data = accuracy_data.read("digits").train
    model = small_vit(32, 1)
    spec, before = image_spec(model, Config()), torch.get_rng_state()
    recipe = accuracy_models.Recipe(150, 64, 4e-3, accuracy_models.Augmentation(shift=0.05))
    assert accuracy_models.train_on_labels(model, data, spec, recipe, seed=0) > 0
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    found = accuracy_pair.predictions(model, data, spec)
    assert (found == data.labels).float().mean() > 0.8


X = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
Y = np.arange(24) % 10


def assert_holds(data, images, labels):
    """All but the last four as training data, in the order that they were written."""
    assert torch.equal(torch.cat([data.train.images, data.test.images]), torch.from_numpy(images.copy()))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == list(labels) and len(data.test) == 4


@pytest.mark.parametrize(
    "images", [X, X.transpose(0, 3, 1, 2), X[..., :1], X[..., 0]], ids=["nhwc", "nchw", "n1", "nhw"]
)
def test_npz_of_any_layout(tmp_path, images):
    file = tmp_path / "some.npz"
    np.savez(file, x_train=images[:20], y_train=Y[:20, None], x_test=images[20:], y_test=Y[20:])
    expected = images[:, None] if images.ndim == 3 else X[..., :1].transpose(0, 3, 1, 2) if images.shape[-1] == 1 else X
    expected = X.transpose(0, 3, 1, 2) if expected is X else expected
    for place in (tmp_path, file):
        assert_holds(accuracy_data.read("cifar10", place), expected, Y)


@pytest.mark.parametrize("dot, packed", [("-", True), (".", False)])
def test_idx_files(tmp_path, dot, packed):
    def write(name, array):
        raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        (tmp_path / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(gzip.compress(raw) if packed else raw)

    for part, chosen in (("train", slice(20)), ("t10k", slice(20, None))):
        write(f"{part}-images{dot}idx3", X[chosen, :28, :28, 0])
        write(f"{part}-labels{dot}idx1", Y[chosen])
    assert_holds(accuracy_data.read("mnist", tmp_path), X[:, None, :28, :28, 0], Y)


def test_idx_files_that_are_cut_off_are_refused(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 28, 28) + bytes(100))
    with pytest.raises(ValueError, match="cut off"):
        accuracy_data.idx(file)
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an idx file"):
        accuracy_data.idx(file)


def write_batches(folder):
    folder.mkdir()
    planes = X.transpose(0, 3, 1, 2).reshape(24, -1)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(4 * i, 4 * i + 4)
        batch = {b"data": planes[part], b"labels": Y[part].tolist(), b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar_batches(tmp_path):
    write_batches(tmp_path / "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        assert_holds(accuracy_data.read("cifar10", place), X.transpose(0, 3, 1, 2), Y)


def test_a_batch_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    write_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"arrays and lists; this file wants .*exec"):
        accuracy_data.read("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_cifar_planes(tmp_path):
    red, green, blue = X[:20].transpose(3, 0, 1, 2)
    planes = np.stack([green, red - green, blue - green])
    planes = np.diff(planes, axis=-1, prepend=np.uint8(0))
    for part, chosen in (("a", slice(10)), ("b", slice(10, 20))):
        raw = struct.pack("<I", 10) + Y[chosen].astype(np.uint8).tobytes() + planes[:, chosen].tobytes()
        (tmp_path / f"cifar10_train_{part}.xz").write_bytes(lzma.compress(raw))
    np.savez(tmp_path / "cifar10_test.npz", x=X[20:], y=Y[20:])
    assert_holds(accuracy_data.read("cifar10", tmp_path), X.transpose(0, 3, 1, 2), Y)


def test_photographs_for_a_cpu_are_cifar10_at_half_its_size(tmp_path):
    write_batches(tmp_path / "cifar-10-batches-py")
    whole, half = (accuracy_data.read(name, tmp_path) for name in ("cifar10", "cifar16"))
    assert half.test.images.shape[1:] == (3, 16, 16)
    corner = whole.train.images[0, :, :2, :2].float().mean((1, 2))
    assert half.train.images[0, :, 0, 0].tolist() == corner.round().tolist()
    assert half.train.labels.equal(whole.train.labels) and len(half.test) == len(whole.test)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass --data-dir, with mnist"):
        accuracy_data.read("mnist")
    with pytest.raises(FileNotFoundError, match="holds no cifar10; accepted: cifar10"):
        accuracy_data.read("cifar10", tmp_path)
    for images, labels, told in ((X / 255, Y, "float64"), (X, Y[:5], "5 labels"), (X, Y + 3, "one of 0 to 9")):
        np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=X, y_test=Y)
        with pytest.raises(ValueError, match=told):
            accuracy_data.read("mnist", tmp_path)


def test_the_fingerprint_is_of_every_pixel():
    data = accuracy_data.read("digits")
    before = data.fingerprint()
    assert accuracy_data.read("digits").fingerprint() == before
    data.test.images[-1, 0, 7, 7] += 1
    assert data.fingerprint() != before
