"""What teacher and student are for. A run asks its task how to look at images, and what it is to be good at it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitkd_fast import evaluate as evaluation
from vitkd_fast.class_names import name_classes
from vitkd_fast.generator import ImageSpec
from vitkd_fast.layout import Layout, layout_of
from vitkd_fast.models import create_student, forward, load_teacher
from vitkd_fast.objectives import Scene, View
from vitkd_fast.run import image_grid

if TYPE_CHECKING:
    from vitkd_fast.config import Config
    from vitkd_fast.pair import Pair


class Classification:
    """Images as wholes: (B, classes) logits."""

    name = "classification"
    tokens = "forward_features that gives (B, N, D) tokens"
    load_teacher = staticmethod(load_teacher)
    create_student = staticmethod(create_student)
    name_classes = staticmethod(name_classes)
    check_evaluation = staticmethod(evaluation.check)

    def look(self, model: Any, images: Tensor) -> View:
        return View(*forward(model, images))

    def classes(self, seen: View) -> int:
        """How many classes a model knows that saw two images so.

        Raises:
            ValueError: it is not what this task needs; says what it is.
        """
        logits = seen.logits
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            detects = isinstance(logits, Tensor) and logits.dim() == 3
            advice = 'For a detector pass task="detection"' if detects else "Wrap it so that it gives them alone"
            raise ValueError(f"gives {given} for two images; accepted: logits of shape (batch, classes). {advice}.")
        if logits.shape[1] < 2:
            raise ValueError(
                "gives one logit, whose softmax is always 1; accepted: two classes and more. Wrap a binary classifier "
                "so that it gives two, 0 and its own."
            )
        return logits.shape[1]

    def found(self, seen: View) -> Tensor:
        """(B, classes) how much of each class a model finds in each image: of the likeliest, how sure it is of it."""
        return of_likeliest(seen.logits.float().softmax(-1))

    def outputs(self, classes: int) -> tuple[int, ...]:
        """Widths of layers that give what the model is for."""
        return (classes,)

    def layout(self, model: nn.Module, count: int, spec: ImageSpec) -> Layout:
        """Where the `count` last tokens of a model lie."""
        return layout_of(model, count, spec)

    def agreement(self, scene: Scene) -> Tensor:
        """Share of images, in [0, 1], for which student and teacher decide alike."""
        assert scene.student is not None
        return (scene.student.logits.argmax(-1) == scene.teacher.logits.argmax(-1)).float().mean()

    def read_evaluation(self, pair: "Pair", data: Any) -> Any:
        """What `evaluate` takes, read and checked before the run rather than after it."""
        return evaluation.tried(pair.teacher, data, pair.spec, pair.device)

    def evaluate(self, pair: "Pair", config: "Config", data: Any) -> dict[str, Any]:
        """The report's figures of both models on real images."""
        return evaluation.evaluate_pair(pair.teacher, pair.student_of_teachers_images, data, pair.spec)

    def picture(self, pair: "Pair", config: "Config", images: Tensor):
        """A PIL image of (B, C, H, W) images."""
        return image_grid(pair.spec.pixels(images))


def of_likeliest(p: Tensor) -> Tensor:
    """(…, classes) probabilities with all but the largest made 0."""
    return p * (p == p.amax(-1, keepdim=True))


def task_of(config: "Config") -> Classification:
    """The task that a configuration names."""
    if config.task == "classification":
        return Classification()
    from vitkd_fast.detection.task import Detection  # needs libraries of the extra `detection`

    return Detection()
