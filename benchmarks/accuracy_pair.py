"""The two networks of a seed: its teacher, given, kept or trained now, and its student, untrained."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from accuracy_bench import Bench, date_and_commit, hash_of, say, write_whole
from accuracy_data import Labelled
from accuracy_models import ResNet, given_teacher, parameters, train_on_labels, vit
from torch import Tensor, nn

from vitkd_fast.checkpoint import load_into, read_state_dict
from vitkd_fast.config import Config
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import digest, image_spec


@dataclass(frozen=True)
class Teacher:
    model: nn.Module
    spec: ImageSpec
    predictions: Tensor
    """(N,) its decisions on the test images."""
    accuracy: float
    digest: str
    seconds: float | None
    """Of its training; None where it was given."""


def teacher_of(bench: Bench, seed: int) -> Teacher:
    """The teacher of this seed: given, kept from an earlier time, or trained now."""
    arguments, task = bench.arguments, bench.task
    seconds = None
    if arguments.teacher_json:
        model = given_teacher(arguments.teacher_json, arguments.teacher_checkpoint).to(bench.device)
    else:
        with _seeded(bench.device, seed):
            model = vit(task.side, task.channels, task.teacher).to(bench.device).eval()
        if arguments.teacher_checkpoint:
            load_into(model, read_state_dict(arguments.teacher_checkpoint), "teacher", arguments.teacher_checkpoint)
        else:
            seconds = _trained(bench, model, seed)
    spec = image_spec(model, Config())
    if (spec.channels, spec.height, spec.width) != tuple(bench.data.test.images.shape[1:]):
        raise ValueError(
            f"the teacher takes {spec.channels} × {spec.height} × {spec.width} images; those of {arguments.data} are "
            f"{' × '.join(map(str, bench.data.test.images.shape[1:]))}."
        )
    found = predictions(model, bench.data.test, spec)
    accuracy = (found == bench.data.test.labels).float().mean().item()
    say(f"seed {seed}: teacher {100 * accuracy:.2f} %, {parameters(model):,} parameters")
    return Teacher(model, spec, found, accuracy, digest(model), seconds)


def _trained(bench: Bench, model: nn.Module, seed: int) -> float:
    from safetensors.torch import load_file, save_file

    task, arguments = bench.task, bench.arguments
    asked = {"data": bench.fingerprint, "sizes": task.teacher, "recipe": asdict(task.recipe), "seed": seed}
    place = arguments.cache / f"{arguments.data}-teacher-seed{seed}-{hash_of({**asked, **bench.machine})}"
    if (place / "run.json").exists() and not arguments.fresh:
        model.load_state_dict(load_file(place / "teacher.safetensors"))
        return json.loads((place / "run.json").read_text())["seconds"]
    say(f"seed {seed}: training the teacher, {task.recipe.steps:,} steps …")
    seconds = train_on_labels(
        model,
        bench.data.train,
        image_spec(model, Config()),
        task.recipe,
        seed=seed,
        precision=arguments.precision,
        say=lambda text: say(f"  teacher: {text}"),
    )
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, place / "teacher.safetensors")
    write_whole(place / "run.json", {"seconds": seconds, **asked, **bench.machine, **date_and_commit()})
    return seconds


def new_student(bench: Bench, spec: ImageSpec, seed: int) -> nn.Module:
    """The student of this seed, untrained: the same one for every contender."""
    with _seeded(bench.device, seed):
        if bench.arguments.student == "resnet20":
            student: nn.Module = ResNet(20, spec.channels, side=spec.height)
        else:
            student = vit(spec.height, spec.channels, bench.task.student, spec.mean, spec.std)
    return student.to(bench.device)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random state from a seed inside, the caller's again outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def predictions(model: nn.Module, data: Labelled, spec: ImageSpec) -> Tensor:
    """(N,) the class that the model gives each image."""
    model.eval()
    parts = (slice(start, start + 250) for start in range(0, len(data), 250))
    with torch.no_grad():
        return torch.cat([model(spec.normalised(data.pixels(part))).argmax(-1) for part in parts])
