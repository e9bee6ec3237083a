"""What generator and student minimise: objectives under names, what each needs to see, and their weighed sum.

An objective of your own is one registered function of a `Scene`, or an nn.Module class where it has weights of its own:

    @generator_objective("student")
    def uncertain(scene):
        return F.softmax(scene.student.logits, dim=-1).amax(-1).mean()

and then `distill(…, generator_objectives={"uncertain": 0.1})`. A module may also have

- `off`: why it has nothing to measure on this pair, or None;
- of a generator's: `watching()`, a context in which the teacher looks at the images, for hooks of its own, and
  `end_round()`, called after the last step of a round.

A run that is resumed gives a module back what its state_dict had; of anything else that it remembers, such as images of
earlier rounds, torch's `get_extra_state` and `set_extra_state` make a part of that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from vitkd_fast.config import Config
from vitkd_fast.suggest import suggestion

if TYPE_CHECKING:
    from vitkd_fast.pair import Pair

Need = Literal["student", "classes", "boxes", "tokens", "blocks", "attention", "labels"]
"""What an objective looks at: the "student" (a student's objective always does), a classifier's "classes" or a
detector's "boxes", the last "tokens", the tokens after all "blocks", the packed qkv of all blocks' "attention", the
"labels" that a generator was asked for. Tokens, blocks and attention are the teacher's for a generator's objective,
both networks' for a student's."""


@dataclass
class View:
    """What one network makes of a batch. Where student and teacher have different depths, blocks are paired."""

    logits: Tensor
    """(B, classes); of a detector (B, queries, classes + 1), the last for there being nothing."""
    tokens: Tensor | None = None
    """The last tokens (B, N, D), after the final norm, of a model with timm's forward_features."""
    blocks: Sequence[Tensor] = ()
    """Tokens after each block, (B, N, D)."""
    attention: Sequence[Tensor] = ()
    """Packed qkv of each block, (B, N, 3, H, D)."""
    boxes: Tensor | None = None
    """Of a detector, (B, queries, 4): centre x, centre y, width, height, in [0, 1] of the image's sides."""
    scores: Tensor | None = None
    """Of a detector whose classes do not exclude each other, (B, queries, classes) in [0, 1]: what ranks its objects
    where its precision is measured."""
    earlier: Sequence["View"] = ()
    """Of a detector, logits and boxes that its encoder proposes and its layers refine. They are handed on without a
    gradient, so what is asked of the detector is asked of them, too."""


@dataclass
class Scene:
    """All that an objective may look at in one step."""

    images: Tensor
    """(B, C, H, W) as the teacher takes them."""
    teacher: View
    student: View | None
    pair: "Pair"
    config: Config
    labels: Tensor | None = None
    """(B,) what the generator was asked for, if it is conditional."""
    noise: Tensor | None = None
    """(B, latent) that the images were made from."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What objectives have worked out and others need too."""


Function = Callable[[Scene], Tensor]
Given = TypeVar("Given", bound=Callable[..., Any])


@dataclass(frozen=True)
class Objective:
    """A term: its function from a Scene to a scalar, or the class of an nn.Module that is one when made with a Pair."""

    name: str
    function: Function | type[nn.Module]
    needs: frozenset[Need]


GENERATOR_OBJECTIVES: dict[str, Objective] = {}
STUDENT_OBJECTIVES: dict[str, Objective] = {}
LOGGED = (  # what else stands beside the terms in a log entry
    *("step", "agreement", "images_per_second", "skipped", "evaluated"),
    *("student_gradient", "generator_gradient"),
)


def generator_objective(*needs: Need) -> Callable[[Given], Given]:
    """Register a function or nn.Module class under its own name as something that a generator can minimise.

    Raises:
        ValueError: an unknown need, or a name that is taken.
    """
    return _register(GENERATOR_OBJECTIVES, needs)


def student_objective(*needs: Need) -> Callable[[Given], Given]:
    """Register a function or nn.Module class under its own name as something that a student can minimise.

    Raises:
        ValueError: an unknown need, or a name that is taken.
    """
    return _register(STUDENT_OBJECTIVES, needs)


def _register(registry: dict[str, Objective], needs: tuple[Need, ...]) -> Callable[[Given], Given]:
    for need in needs:
        if need not in get_args(Need):
            raise ValueError(f"an objective cannot need {need!r}; accepted: {', '.join(get_args(Need))}.")

    def register(function: Given) -> Given:
        name = function.__name__
        if name in GENERATOR_OBJECTIVES or name in STUDENT_OBJECTIVES or name in LOGGED:
            raise ValueError(f"an objective cannot be called {name!r}: the log has that name already.")
        registry[name] = Objective(name, function, frozenset(needs))
        return function

    return register


@dataclass
class Terms:
    """The objectives of one side of one run, with their weights."""

    objectives: list[Objective]
    weights: dict[str, float]
    functions: dict[str, Function]
    modules: nn.ModuleList = field(default_factory=nn.ModuleList)
    """Those that have weights of their own."""
    notes: list[str] = field(default_factory=list)
    tried: bool = False

    @classmethod
    def of(
        cls, weights: Mapping[str, float], registry: Mapping[str, Objective], pair: "Pair", *, labels: bool = False
    ) -> "Terms":
        """Those of non-zero weight that can be given what they need; the pair's notes say which cannot.

        `labels` says that the generator is asked for classes.
        """
        chosen: list[Objective] = []
        functions: dict[str, Function] = {}
        for objective in (registry[name] for name, weight in weights.items() if weight):
            function: Any = objective.function
            missing = pair.missing(objective.needs, student=registry is STUDENT_OBJECTIVES)
            if "labels" in objective.needs and not labels:
                missing = "images have no labels, unless conditional=True asks the generator for classes"
            if missing is None and isinstance(function, type):
                function = function(pair).to(pair.device)
                missing = getattr(function, "off", None)
            if missing is None:
                chosen.append(objective)
                functions[objective.name] = function
            else:
                pair.notes.append(f"{objective.name} is off: {missing}")
        modules = nn.ModuleList(function for function in functions.values() if isinstance(function, nn.Module))
        return cls(chosen, {one.name: weights[one.name] for one in chosen}, functions, modules, pair.notes)

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(objective.needs for objective in self.objectives))

    def __call__(self, scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighed sum, and every term unweighted, by name.

        Raises:
            ValueError: a term is not a scalar, or nothing that is to learn has a part in any.
        """
        values: dict[str, Tensor] = {}
        learning = torch.is_grad_enabled()
        for name, function in self.functions.items():
            value = function(scene)
            if not isinstance(value, Tensor) or value.dim():
                given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"objective {name!r} gives {given}; it must give a scalar, a tensor of shape ().")
            values[name] = value.float()
        if learning and not self.tried:
            idle = [name for name, value in values.items() if not value.requires_grad]
            self.notes += [f"{name} does nothing: what it measures has no gradient" for name in idle]
            self.tried = True
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        if learning and not total.requires_grad:
            raise ValueError(f"nothing that learns has a part in {' and '.join(values)}: there is no gradient.")
        return total, values


def check_names(weights: Mapping[str, float], registry: Mapping[str, Objective], setting: str) -> None:
    """Refuse an objective that does not exist.

    Raises:
        ValueError: with the nearest that does, or all of them.
    """
    for name in weights:
        if name not in registry:
            raise ValueError(f"{setting} has no {name!r}; {suggestion(name, registry)}")
