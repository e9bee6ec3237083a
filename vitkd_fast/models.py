"""Teacher and student: modules as given, or timm names; what a teacher knows about its images; how both are run."""

import contextlib
import difflib
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast.checkpoint import load_into, read_state_dict
from vitkd_fast.config import Config
from vitkd_fast.generator import ImageSpec

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # names of timm models that are not in its own registry


def default_device(device: str | None, *models: nn.Module | str) -> torch.device:
    """The device asked for, else that of the first module given, else CUDA where there is one."""
    if device is not None:
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}; accepted: cpu, cuda, cuda:0, …") from error
        if found.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {device!r}; accepted: cpu, cuda, cuda:0, …")
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch sees no CUDA device; `vitkd doctor` says more.")
        return found
    for model in models:
        if isinstance(model, nn.Module) and (there := device_of(model)) is not None:
            return there
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: nn.Module) -> torch.device | None:
    """Where its weights are; a model that was exported may have them as buffers. None: it has none."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)


def load_teacher(teacher: nn.Module | str, config: Config) -> nn.Module:
    """The module as given, or the timm model of that name with the weights of `teacher_checkpoint` or timm's own.

    Raises:
        ValueError: the name is not timm's, or a checkpoint is given to a module.
        RuntimeError: no weights can be had. A teacher with random weights is never returned.
    """
    if isinstance(teacher, nn.Module):
        if config.teacher_checkpoint is not None:
            raise ValueError("teacher_checkpoint goes with a teacher given by name; load it into your module yourself.")
        return teacher
    _check_name(teacher, "teacher")
    if config.teacher_checkpoint is not None:
        return _from_checkpoint(teacher, config.teacher_checkpoint, config)
    try:
        if not teacher.startswith(ELSEWHERE) and not _timm().is_model_pretrained(teacher):
            raise RuntimeError("timm has none of that name")
        return _create(teacher, config.image_size, pretrained=True, **_channels(config.channels))
    except Exception as error:  # hub, network and file errors share no base class
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise RuntimeError(
            f"No pretrained weights for teacher {teacher!r}: {reason}. "
            f"Pass teacher_checkpoint= (--teacher-checkpoint), a safetensors or state_dict file."
        ) from error


def create_student(student: nn.Module | str, spec: ImageSpec, classes: int) -> nn.Module:
    """The module as given, or an untrained timm model of that name for the teacher's images and classes.

    The new model's pretrained_cfg says the teacher's images too, in place of timm's normalisation for its own weights.
    """
    if isinstance(student, nn.Module):
        return student
    _check_name(student, "student")
    model: Any = _create(student, (spec.height, spec.width), num_classes=classes, in_chans=spec.channels)
    size = spec.channels, spec.height, spec.width
    model.pretrained_cfg = {**_cfg(model), "input_size": size, "mean": spec.mean, "std": spec.std}
    return model


def image_spec(teacher: nn.Module, config: Config) -> ImageSpec:
    """Image size, channels and normalisation: from the configuration, else from the teacher.

    A timm model knows its size and channels by its patch embedding, and its normalisation by pretrained_cfg; a module
    may carry `pretrained_cfg` or `default_cfg` = dict(input_size=(C, H, W), mean=(…), std=(…)) of its own.

    Raises:
        ValueError: neither says the size or the channels.
    """
    cfg = _cfg(teacher)
    size = config.image_size or _own_size(teacher) or tuple(cfg.get("input_size") or ())[1:]
    channels = config.channels or _input_channels(teacher, size)
    if not size or not channels:
        missing = " and ".join(name for name, known in (("image_size", size), ("channels", channels)) if not known)
        raise ValueError(
            f"{missing} cannot be read from teacher {type(teacher).__name__}: it has no patch_embed.img_size, "
            f"pretrained_cfg or default_cfg. Pass {missing}= (image_size is height, width)."
        )
    normalisation = (
        _per_channel(name, getattr(config, name), cfg.get(name) or (0.5,), channels) for name in ("mean", "std")
    )
    return ImageSpec(int(size[0]), int(size[1]), *normalisation)


def student_image_spec(student: nn.Module, teacher: nn.Module, spec: ImageSpec) -> ImageSpec:
    """What a student takes: the teacher's images, of this spec, but for what it says of itself.

    Its size is its patch embedding's, unless that takes any (timm's dynamic_img_size), else that of its pretrained_cfg
    or default_cfg, unless timm says there that any will do (fixed_input_size); its normalisation is its
    pretrained_cfg's. A cfg that says what the teacher's says is the teacher's, whatever the configuration puts in its
    place.
    """
    cfg, others = _cfg(student), _cfg(teacher)

    def own(name: str) -> tuple:
        said = tuple(cfg.get(name) or ())
        return () if said == tuple(others.get(name) or ()) else said

    patch_embed = getattr(unwrapped(student), "patch_embed", None)
    size = _own_size(student)
    if size is None and cfg.get("fixed_input_size") is not False:
        size = own("input_size")[1:]
    if not size or not getattr(patch_embed, "strict_img_size", True):
        size = spec.height, spec.width
    normalisation = (
        _per_channel(name, None, own(name) or getattr(spec, name), spec.channels) for name in ("mean", "std")
    )
    return ImageSpec(int(size[0]), int(size[1]), *normalisation)


def forward(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (B, classes) of the model as it is called, with its hooks and a forward of its own; and, where that goes
    through timm's forward_features or a classifier of transformers, the last tokens (B, N, D), else None.

    Where a model in training gives the logits of two heads that timm averages in eval mode, as its DeiT does after
    set_distilled_training, so are they here; of others' logits and auxiliary ones, as Inception has, the first count.
    """
    with _features_recorded(model) as seen:
        logits = logits_of(model(images))
    features = seen[-1] if seen else None
    if isinstance(logits, Tensor) and logits.is_inference() and not torch.is_inference_mode_enabled():
        # A teacher whose forward is under inference_mode: what autograd is to keep for backward is a copy.
        logits, features = logits.clone(), features.clone() if isinstance(features, Tensor) else features
    if isinstance(logits, tuple) and logits and model.training:
        averaged = hasattr(unwrapped(model), "set_distilled_training") and len(logits) == 2
        logits = (logits[0] + logits[1]) / 2 if averaged else logits[0]
    return logits, features if isinstance(features, Tensor) and features.dim() == 3 else None


def logits_of(output: Any) -> Any:
    """What a classifier gives, of those of transformers the logits in it."""
    return output["logits"] if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor) else output


@contextmanager
def _features_recorded(model: Any) -> Iterator[list[Any]]:
    """What the model's forward_features, a method or a module, returns while the model is called; of a classifier of
    transformers the last hidden states."""
    seen: list[Any] = []
    method = getattr(model, "forward_features", None)
    base = getattr(model, "base_model", None)
    base = getattr(model, "vision_model", None) if base is model else base  # as classifiers of SigLIP and CLIP are made
    if method is None and isinstance(base, nn.Module) and base is not model:
        with base.register_forward_hook(lambda module, given, returned: seen.append(_last_hidden_state(returned))):
            yield seen
        return
    if isinstance(method, nn.Module):
        with method.register_forward_hook(lambda module, given, returned: seen.append(returned)):
            yield seen
        return
    own = "forward_features" in vars(model)
    of_class = getattr(type(model), "forward_features", None)
    if method is None or (isinstance(of_class, property) and not own):
        yield seen
        return

    def record(*args, **kwargs):
        seen.append(method(*args, **kwargs))
        return seen[-1]

    model.forward_features = record
    try:
        yield seen
    finally:
        if own:
            model.forward_features = method
        else:
            del model.forward_features


def _last_hidden_state(output: Any) -> Any:
    return output.get("last_hidden_state") if isinstance(output, Mapping) else None


def digest(model: nn.Module) -> str:
    """Of all that a model's state_dict holds: 16 hexadecimal digits that other weights do not have."""
    found = hashlib.sha256()
    held = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in held.items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest_of_learning(model: nn.Module) -> str:
    """Of the names and shapes of the weights that learn: 8 hexadecimal digits."""
    learning = [f"{name} {tuple(w.shape)}" for name, w in model.named_parameters() if w.requires_grad]
    return hashlib.sha256("\n".join(learning).encode()).hexdigest()[:8]


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no weight gradients inside; each submodule's mode and each weight's requires_grad come back after.

    Gradients still flow through to the images: a third of the backward pass, the weights', is not computed.
    """
    modes = [(module, module.training) for model in models for module in model.modules() if hasattr(module, "training")]
    roots = [(model, model.training) for model in models if hasattr(model, "training")]  # not frozen TorchScript
    parameters = (weight for model in models for weight in model.parameters())
    trainable = [weight for weight in parameters if weight.requires_grad and not weight.is_inference()]
    try:
        _turn([(root, False) for root, _ in roots], [(module, False) for module, _ in modes])
        for weight in trainable:
            weight.requires_grad_(False)
        yield
    finally:
        _turn(roots, modes)
        for weight in trainable:
            weight.requires_grad_(True)


def _turn(roots: list[tuple[nn.Module, bool]], modes: list[tuple[nn.Module, bool]]) -> None:
    """By train(), where some models drop what they keep in eval mode from pass to pass; then each module by itself."""
    for root, training in roots:
        with contextlib.suppress(NotImplementedError):  # of an exported one
            root.train(training)
    for module, training in modes:
        module.training = training


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, what torch.compile made of the model or of parts of it runs by its Python code, where hooks are heard."""
    compiled = any("_orig_mod" in module._modules or _compiled_in_place(module) for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


def _compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _from_checkpoint(name: str, path: Path, config: Config) -> nn.Module:
    """The classes and channels are the checkpoint's: its classifier and its first convolution say them."""
    usual = _create(name, config.image_size)
    state, cfg = read_state_dict(path), _cfg(usual)
    head = _entry(state, cfg.get("classifier"))
    stem, of_usual = (_entry(held, cfg.get("first_conv")) for held in (state, usual.state_dict()))
    channels = config.channels
    if channels is None and stem is not None and of_usual is not None and stem.dim() == of_usual.dim() == 4:
        channels = 3 * stem.shape[1] // of_usual.shape[1]  # of stems after which pixels are channels, too
    classes = {} if head is None else {"num_classes": head.shape[0]}
    model = _create(name, config.image_size, **classes, **_channels(channels))
    load_into(model, state, name, path)
    return model


def _entry(state: dict[str, Tensor], module: str | tuple[str, ...] | None) -> Tensor | None:
    name = module if isinstance(module, str) or module is None else module[0]
    return state.get(f"{name}.weight")


def _channels(channels: int | None) -> dict[str, int]:
    return {} if channels is None else {"in_chans": channels}


def _create(name: str, size: tuple[int, int] | None, **options: Any) -> nn.Module:
    timm = _timm()
    if size is not None:
        try:
            return timm.create_model(name, img_size=size, **options)
        except TypeError:  # convolutional models take any size, and no img_size
            pass
    return timm.create_model(name, **options)


def _check_name(name: str, role: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{role} is a {type(name).__name__}; accepted: an nn.Module or the name of a timm model.")
    timm = _timm()
    if not name.startswith(ELSEWHERE) and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them."
        raise ValueError(f"{role} {name!r} is not a timm model; {hint}")


def _timm():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError when it does not fit the torch
        raise ImportError(
            f"Models by name need timm, which cannot be imported here: {error}. pip install timm"
        ) from error
    return timm


def normalisation_note(teacher: nn.Module, config: Config) -> str | None:
    """What to know where nobody says how the teacher's images are normalised."""
    unknown = [name for name in ("mean", "std") if getattr(config, name) is None and not _cfg(teacher).get(name)]
    if not unknown:
        return None
    return (
        f"teacher: it does not say the {' and '.join(unknown)} of its images, so 0.5 is assumed; if they are others, "
        f"pass {' and '.join(f'{name}=' for name in unknown)}"
    )


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The height and width that a ViT's patch embedding says; some say one number for both."""
    size = getattr(getattr(unwrapped(model), "patch_embed", None), "img_size", None)
    return (size, size) if isinstance(size, int) else size


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside DataParallel, DistributedDataParallel, an averaged model or torch.compile's."""
    for name in ("module", "_orig_mod"):
        if isinstance(inner := dict(model.named_children()).get(name), nn.Module) and len(model._modules) == 1:
            return unwrapped(inner)
    return model


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if said is None and (inner := unwrapped(model)) is not model:
        return _cfg(inner)
    return _config_of_transformers(model) | dict(said or {})


def _config_of_transformers(model: nn.Module) -> dict[str, Any]:
    """The image size that a model of transformers says in its config, if it has one."""
    config = getattr(model, "config", None)
    if isinstance(of_timm := getattr(config, "pretrained_cfg", None), Mapping):  # of one of timm's, wrapped
        return dict(of_timm)
    config = getattr(config, "vision_config", config)  # of one half of a model of images and text
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if not size or not channels:
        return {}
    return {"input_size": (channels, *((size, size) if isinstance(size, int) else size))}


def _input_channels(model: nn.Module, size: Any) -> int | None:
    said = next(iter(_cfg(model).get("input_size") or ()), None)
    found = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    # With in_chans= timm changes the network alone, whose first convolution tells, unless pixels are its channels.
    timms = type(unwrapped(model)).__module__.startswith("timm.")
    if not (timms and said and found and size) or said == found:
        return said or found
    return found if _takes(model, found, size) else said


def _takes(model: nn.Module, channels: int, size: Any) -> bool:
    try:
        with frozen(model), torch.no_grad():
            model(torch.zeros(2, channels, *size, device=device_of(model)))
    except Exception:  # whatever a stranger's forward raises
        return False
    return True


def _per_channel(name: str, given: tuple | None, known: tuple, channels: int) -> tuple[float, ...]:
    values = given or known
    if len(values) in (1, channels):
        return tuple(map(float, values)) * (channels // len(values))
    if given:
        raise ValueError(f"{name} has {len(given)} values, but the teacher's images have {channels} channels.")
    return (sum(values) / len(values),) * channels  # timm, too, folds RGB weights when in_chans is not 3
