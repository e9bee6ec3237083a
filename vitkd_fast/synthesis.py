"""Where the student's images come from: rounds in which a generator is improved, and a pool of what it made."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast import contrast, noisy_generator, procedural, transformer_generator  # noqa: F401  they register
from vitkd_fast.augment import augmented
from vitkd_fast.config import Config
from vitkd_fast.detection import scene_generator  # noqa: F401  it registers
from vitkd_fast.generator import GENERATORS, Generator, GeneratorSettings, Several
from vitkd_fast.guard import PEAK, GuardedOptimizer
from vitkd_fast.methods import settings_of
from vitkd_fast.models import frozen
from vitkd_fast.objectives import Scene, Terms
from vitkd_fast.pair import Pair
from vitkd_fast.replay import ReplayPool
from vitkd_fast.sparse import LivePatches

Autocast = Callable[[], contextlib.AbstractContextManager]
LEAST_FOUND = 0.1  # of a class at least this part of an equal share is taken as found
OF_LEARNING = ("generator_steps", "restart", "life", "robust", "jitter", "keep_patches", "generator_lr")
META_RATE = 0.5  # how far the weights that rounds start from move to where a round ended (Nichol et al. 2018, Reptile)


class Synthesis:
    """A generator, what it minimises and in which rhythm, as the configuration says.

    Raises:
        ValueError: settings that contradict each other.
    """

    def __init__(self, pair: Pair, terms: Terms, config: Config, autocast: Autocast) -> None:
        _check(config)
        self.pair, self.terms, self.config, self.autocast = pair, terms, config, autocast
        settings = GeneratorSettings(
            config.latent, config.width, pair.classes if config.conditional else 0, config.batch_size
        )
        kind = GENERATORS[config.generator]
        made = [kind(pair.spec, settings) for _ in range(config.generators)]
        self.generator: Generator = (made[0] if config.generators == 1 else Several(made)).to(pair.device)
        self.pool = ReplayPool(config.pool, self.generator, pair.classes if config.balanced else 0)
        self.patches = _patches(pair, terms, config)
        self.latent = nn.Parameter(torch.zeros(config.batch_size, config.latent, device=pair.device))
        learns = [self.generator, self.terms.modules]
        learns += [nn.ParameterList([self.latent])] if config.learn_latent else []
        self.learner: GuardedOptimizer | None = None
        _check_learning(self.generator, self.terms, config)
        pair.notes += _idle(config, learns=bool(self.terms.names))
        if self.terms.names:
            self.learner = GuardedOptimizer(
                "generator",
                nn.ModuleList(learns),
                config.generator_lr,
                self.terms.names,
                betas=(0.5, 0.999),
                clip=config.clip,
                own_lr={self.latent: config.latent_lr} if config.learn_latent else None,
            )
        learning_start = config.restart == "meta"
        self.start = [weight.detach().clone() for weight in self.generator.parameters()] if learning_start else []
        self.rounds = 0
        self.images: Tensor | None = None  # of this round

    def round(self, progress: float) -> None:
        """Improve the generator, if it can learn, and add to the pool, if that is what the student sees."""
        improved = None if self.learner is None else self._improve(self.learner, progress)
        if self.config.images == "pool":
            with torch.no_grad(), self.autocast():
                images, classes = self._chosen(improved)
            self.pool.add(images, classes)

    def _chosen(self, improved: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        """A batch for the pool, and its classes if they matter; of candidates those in which most is found."""
        config, pair = self.config, self.pair
        batches = [self._images(*(improved or self._draw())) for _ in range(config.candidates)]
        images, classes = torch.cat(batches), None
        if config.candidates == 1 and not config.balanced:
            return images, classes
        seen = [pair.look(pair.teacher, batch) for batch in batches]  # one by one: no more memory than a student's step
        if config.balanced:
            classes = torch.cat([view.logits.argmax(-1) for view in seen])
        if config.candidates > 1:
            best = richest(torch.cat([pair.task.found(view) for view in seen]), config.batch_size)
            images, classes = images[best], None if classes is None else classes[best]
        return images, classes

    def _improve(self, learner: GuardedOptimizer, progress: float) -> tuple[Tensor, Tensor | None]:
        """Images on which the networks say what the objectives want; noise and labels of the last of them."""
        config = self.config
        self._restart()
        # Where the images of a round are what is wanted, they are the same throughout; else each step has its own.
        same = config.learn_latent or config.restart != "never" or config.images != "fresh"
        noise, labels = self._draw()
        with frozen(self.pair.student):  # and in backward, which computes checkpointed activations again
            for step in range(config.generator_steps):
                if step and not same:
                    noise, labels = self._draw()
                loss, values, images = self._judge(noise, labels, step)
                learner.step(loss, values, self._progress(step, progress))
        self.images = images
        for module in self.terms.modules:
            if hasattr(module, "end_round"):
                module.end_round()  # type: ignore[operator]
        if config.restart == "meta":
            torch._foreach_lerp_(self.start, [weight.detach() for weight in self.generator.parameters()], META_RATE)
        self.rounds += 1
        return noise, labels

    def batch(self, step: int) -> Tensor:
        """Images for the student's step, without a graph, each moved a little by its own."""
        config = self.config
        if config.images == "pool":
            images = self.pool.sample(config.batch_size)
        elif config.images == "round" and self.images is not None:
            images = self.images
        elif is_due(step, config.replay):
            images = self.pool.sample(config.batch_size)
        else:
            images = self.generator.sample(config.batch_size)
            if config.replay:
                self.pool.add(images)
        return augmented(images, config.shift, config.turn)

    def state_dict(self) -> dict[str, Any]:
        """All that the next round and batch depend on, between two rounds."""
        return {
            "generator": self.generator.state_dict(),
            "turn": self.generator.turn if isinstance(self.generator, Several) else None,
            "learner": self.learner.state_dict() if self.learner else None,
            "pool": self.pool.state_dict(),
            "start": self.start,
            "rounds": self.rounds,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        if isinstance(self.generator, Several):
            self.generator.turn = state["turn"]
        if self.learner:
            self.learner.load_state_dict(state["learner"])
        self.pool.load_state_dict(state["pool"])
        self.start, self.rounds, self.images = state["start"], state["rounds"], state["images"]

    def _judge(self, noise: Tensor, labels: Tensor | None, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, its terms and the images of one step."""
        pair, config, needs = self.pair, self.config, self.terms.needs
        dropping = self.patches is not None and self.patches.due(step, config.generator_steps)
        with self.autocast():
            made = self._images(noise, labels)  # (B, C, H, W)
            images = rolled(made, config.jitter)
            if config.robust:
                images = augmented(images, config.shift, config.turn)
            student = None
            if "student" in needs:
                student = pair.look(pair.student, images)
            with self._watching():
                teacher = pair.look(pair.teacher, images, needs | {"attention"} if dropping else needs, paired=False)
            loss, values = self.terms(Scene(images, teacher, student, pair, config, labels, noise))
            if dropping:
                self.patches.drop(teacher.attention[-1], step, config.generator_steps)  # type: ignore[union-attr]
        return loss, values, made.detach()

    def _draw(self) -> tuple[Tensor, Tensor | None]:
        noise, labels = self.generator.draw(self.config.batch_size)
        return self.latent if self.config.learn_latent else noise, labels

    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        images = self.generator(noise, labels)
        return images if self.patches is None else self.patches.shown(images)

    @contextlib.contextmanager
    def _watching(self):
        with contextlib.ExitStack() as stack:
            for part in (*self.terms.modules, self.patches):
                if hasattr(part, "watching"):
                    stack.enter_context(part.watching())
            yield

    def _restart(self) -> None:
        """Begin a round; what begins anew loses the optimiser's averages too."""
        if isinstance(self.generator, Several):
            self.generator.next()
        config, weights = self.config, list(self.generator.parameters())
        anew = weights if config.restart != "never" else []
        if config.restart == "round":
            self.generator.restart()
        elif config.life and self.rounds and self.rounds % config.life == 0:
            self.generator.restart()
            anew = weights
            for start, weight in zip(self.start, weights):
                start.copy_(weight.detach())
        elif config.restart == "noise":
            self.generator.restart_noise()
        elif config.restart == "meta":
            with torch.no_grad():
                torch._foreach_copy_([*weights], self.start)
        if config.learn_latent:
            with torch.no_grad():
                self.latent.normal_()
            anew = [*anew, self.latent]
        if self.learner is not None:
            for weight in anew:
                for average in self.learner.optimizer.state.get(weight, {}).values():
                    average.zero_()
        if self.patches is not None:
            self.patches.begin()

    def _progress(self, step: int, progress: float) -> float:
        """Where on its one cycle the learning rate is."""
        if self.config.restart == "never":
            return progress
        return (step + 1) / (self.config.generator_steps + 1) if self.config.restart == "round" else PEAK


def rolled(images: Tensor, share: float) -> Tensor:
    """All (B, C, H, W) images moved alike, by a random offset of up to `share` of their sides; what leaves enters
    opposite."""
    if share == 0:
        return images
    for dim in (-2, -1):
        size, most = images.shape[dim], round(images.shape[dim] * share)
        move = torch.randint(-most, most + 1, (1,), device=images.device)
        images = images.index_select(dim, (torch.arange(size, device=images.device) + move).remainder(size))
    return images


def richest(found: Tensor, count: int) -> Tensor:
    """Indices of the `count` images in which most is found, (B, classes) with all classes counting alike: what is found
    of a rare one counts more, as if of each at least a part `LEAST_FOUND` of an equal share were found."""
    of_class = found.sum(0)
    return (found / (of_class + LEAST_FOUND * of_class.mean()).clamp_min(1e-30)).sum(-1).topk(count).indices


def is_due(step: int, share: float) -> bool:
    """Whether this step is one of a share of all steps: evenly spread, never the first."""
    return int((step + 1) * share) > int(step * share)


def _check(config: Config) -> None:
    if config.balanced and config.images != "pool":
        raise ValueError(f"balanced is True, which goes with images='pool'; images is {config.images!r}.")
    if config.balanced and config.task == "detection":
        raise ValueError("balanced is True, which is for classifiers: an image with objects is not of one class.")
    if config.candidates > 1 and (config.images != "pool" or any(config.generator_objectives.values())):
        raise ValueError(
            f"candidates is {config.candidates}; several are drawn for one where images='pool' and the generator does "
            f"not learn: set candidates=1."
        )
    if config.generators > 1 and (config.restart != "never" or config.life or config.learn_latent):
        raise ValueError(
            f"generators is {config.generators}; several take turns only where they go on learning: with "
            f"restart='never', life=0 and learn_latent=False."
        )
    if config.keep_patches < 1 and config.jitter:
        raise ValueError(
            f"keep_patches is {config.keep_patches} and jitter {config.jitter}; dropped patches stay where they are, "
            f"so images cannot be rolled: set one of them to keep_patches=1 or jitter=0."
        )
    if config.keep_patches < 1 and config.robust:
        raise ValueError(
            f"keep_patches is {config.keep_patches} and robust is True; dropped patches stay where they are, so images "
            f"cannot be moved: set one of them to keep_patches=1 or robust=False."
        )
    if config.keep_patches < 1 and config.restart != "round":
        raise ValueError(f"keep_patches is {config.keep_patches}, which goes with restart='round'.")


def _check_learning(generator: Generator, terms: Terms, config: Config) -> None:
    """A generator that can learn has something to minimise, and one that cannot has not."""
    learns = any(weight.requires_grad for weight in generator.parameters())
    if config.learn_latent and not terms.names:
        raise ValueError(
            f"learn_latent is True, but nothing says what noise is good under method {config.method!r}; give "
            f"generator_objectives, or set learn_latent=False."
        )
    if config.learn_latent and not learns and not _learns_from_noise(generator, config.batch_size):
        raise ValueError(
            f"learn_latent is True, but generator {config.generator!r} takes nothing from the noise; set "
            f"learn_latent=False, or choose another generator, such as 'convolutional'."
        )
    if config.restart == "meta" and not learns:
        raise ValueError(
            f"restart is 'meta', and generator {config.generator!r} has no weights to start from; set restart='never', "
            f"or choose another generator, such as 'convolutional'."
        )
    if config.generators > 1 and not learns:
        raise ValueError(
            f"generators is {config.generators}, and generator {config.generator!r} has nothing to learn: several "
            f"would make the same images; set generators=1."
        )
    if terms.names and not learns and not config.learn_latent:
        raise ValueError(
            f"generator {config.generator!r} has nothing to learn, so generator_objectives {', '.join(terms.names)} "
            f"would do nothing; leave them out, or choose another generator, such as 'convolutional'."
        )
    if learns and not terms.names:
        raise ValueError(
            f"generator {config.generator!r} has nothing to minimise under method {config.method!r}; give "
            f"generator_objectives, or a method whose generator learns, such as 'adversarial'."
        )


def _idle(config: Config, learns: bool) -> list[str]:
    """What is set beside the method and does nothing.

    Raises:
        ValueError: without a generator that learns the student would not see what was asked for.
    """
    if config.images == "round" and not learns:
        raise ValueError(
            f"images is 'round', the batch that a round improved, and generator {config.generator!r} learns nothing; "
            f"set images='fresh' or 'pool'."
        )
    of_method = settings_of(config.method, config.task)
    changed = [name for name in of_method if getattr(config, name) != of_method[name]]
    notes = [f"{name} is off: the generator does not learn" for name in changed if name in OF_LEARNING and not learns]
    if "replay" in changed and config.images != "fresh":
        notes.append(f"replay is off: it goes with images='fresh'; images is {config.images!r}")
    if "latent_lr" in changed and not config.learn_latent:
        notes.append("latent_lr is off: learn_latent is False")
    return notes


def _learns_from_noise(generator: Generator, count: int) -> bool:
    noise, labels = generator.draw(count)
    return generator(noise.requires_grad_(), labels).requires_grad


def _patches(pair: Pair, terms: Terms, config: Config) -> LivePatches | None:
    if config.keep_patches == 1:
        return None
    if "attention_consistency" in terms.names:
        raise ValueError(
            f"keep_patches is {config.keep_patches}, and attention_consistency compares all patches of an image with "
            f"those of its mirror image: set keep_patches=1 or leave it out."
        )
    missing = LivePatches.missing(pair)
    if missing is not None:
        pair.notes.append(f"keep_patches is off: {missing}")
        return None
    return LivePatches(pair, config.keep_patches)
