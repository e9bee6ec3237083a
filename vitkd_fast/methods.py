"""The published methods, and ours, as settings of one loop: what is optimised, in what rhythm, on which images.

A method of your own is one call: `register(Method("mine", "what it is", {"student_steps": 3, …}))`; then
`distill(…, method="mine")`. Its settings are fields of `vitkd_fast.Config`, those under "What the method decides".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vitkd_fast.suggest import suggestion


@dataclass(frozen=True)
class Method:
    """Settings under a name; what they do not mention is as in `BASE`."""

    name: str
    source: str
    """The paper, and what we changed to fit it to Vision Transformers."""
    settings: Mapping[str, Any] = field(default_factory=dict)


BASE: dict[str, Any] = {
    "generator": "convolutional",
    "generators": 1,
    "generator_objectives": {},
    "student_objectives": {"logits": 1.0},
    "generator_steps": 1,
    "student_steps": 5,
    "restart": "never",
    "life": 0,
    "learn_latent": False,
    "conditional": False,
    "images": "fresh",
    "replay": 0.0,
    "pool": 8192,
    "candidates": 1,
    "balanced": False,
    "shift": 0.125,
    "turn": 0.0,
    "robust": False,
    "jitter": 0.0,
    "keep_patches": 1.0,
    "student_loss": "kl",
    "disagreement": "l1",
    "temperature": 1.0,
    "generator_lr": 1e-3,
    "latent_lr": 0.015,
}

TaskName = Literal["classification", "detection"]
METHODS: dict[str, Method] = {}
DETECTION_METHODS: dict[str, Method] = {}


def methods_of(task: TaskName) -> dict[str, Method]:
    return DETECTION_METHODS if task == "detection" else METHODS


def register(method: Method, task: TaskName = "classification") -> Method:
    """Make a method known to `Config(method=…)` and `--method`, for one task.

    Raises:
        ValueError: the name is taken, or a setting is not one that a method decides.
    """
    known = methods_of(task)
    if method.name in known:
        raise ValueError(f"there is a method {method.name!r} already; choose another name.")
    for name in method.settings:
        if name not in BASE:
            raise ValueError(f"method {method.name!r} sets {name!r}; a method decides {', '.join(BASE)}.")
    known[method.name] = method
    return method


def settings_of(name: str, task: TaskName = "classification") -> dict[str, Any]:
    """All that the method decides, by the name of the Config field.

    Raises:
        ValueError: there is no such method for this task.
    """
    known = methods_of(task)
    if not isinstance(name, str) or name not in known:
        of_task = "" if task == "classification" else f" and task {task!r}"
        raise ValueError(f"method is {name!r}{of_task}; {suggestion(name, known)}")
    return BASE | dict(known[name].settings)


register(
    Method(
        "best",
        "Ours: what measured best for ViTs (benchmarks/accuracy.py). Images that a program draws "
        "(vitkd_fast.procedural), all of the teacher's classes equally often; the student matches its logits and its "
        "last tokens.",
        {
            "generator": "procedural",
            "images": "pool",
            "pool": 20_480,
            "balanced": True,
            "student_objectives": {"logits": 1.0, "tokens": 1.0},
            "student_loss": "mse",
        },
    )
)
register(
    Method(
        "adversarial",
        "Ours, with generators that learn: disagreement from DFAD (Fang et al. 2019), class priors from DAFL (Chen et "
        "al. 2019), four generators in turn, earlier images replayed, the teacher's last tokens matched.",
        {
            "generator_objectives": {"disagreement": 0.3, "one_hot": 1.0, "balance": 5.0},
            "student_objectives": {"logits": 1.0, "tokens": 1.0},
            "student_loss": "l1",
            "replay": 0.5,
            "generators": 4,
        },
    )
)
register(
    Method(
        "vitkd",
        "Habib et al. 2024 (arXiv 2408.05952): a generator with self-attention, L_G = L_adv + λ L_attention; student "
        "λ_KD L_KD + λ_CE L_CE + λ_patch L_patch. The paper does not give L_attention, the layers or any number: the "
        "forms in vitkd_fast.ops, the generator in vitkd_fast.transformer_generator and all weights here are ours; so "
        "is class balance, without which the generator settles on one class.",
        {
            "generator": "transformer",
            "generator_objectives": {"disagreement": 1.0, "attention_consistency": 1.0, "balance": 5.0},
            "student_objectives": {"logits": 1.0, "hard": 0.1, "attention": 1.0},
            "temperature": 4.0,
            "disagreement": "js",
            "generator_lr": 3e-3,
        },
    )
)
register(
    Method(
        "dafl",
        "Chen et al. 2019 (arXiv 1904.01186): L_G = L_oh + 5 L_ie + 0.1 L_a; the student learns by KL on the very "
        "batch that the generator was improved with. Their feature is a CNN's before its classifier; here, the last "
        "tokens.",
        {
            "generator_objectives": {"one_hot": 1.0, "balance": 5.0, "activation": 0.1},
            "student_steps": 1,
            "images": "round",
            "shift": 0.0,
        },
    )
)
register(
    Method(
        "zskt",
        "Micaelli and Storkey 2019 (arXiv 1905.09768): the generator maximises KL(teacher ‖ student); ten student "
        "steps on the same batch, with attention transfer: between attention maps here, a CNN's activation maps "
        "there.",
        {
            "generator_objectives": {"disagreement": 1.0},
            "student_objectives": {"logits": 1.0, "attention": 1.0},
            "student_steps": 10,
            "images": "round",
            "disagreement": "kl",
            "shift": 0.0,
        },
    )
)
register(
    Method(
        "dfad",
        "Fang et al. 2019 (arXiv 1912.11006): generator and student play for the mean absolute difference of the "
        "logits, five student steps on fresh images for one of the generator; no other prior.",
        {
            "generator_objectives": {"disagreement": 1.0},
            "student_loss": "l1",
            "shift": 0.0,
        },
    )
)
register(
    Method(
        "cmi",
        "Fang et al. 2021 (CMI, arXiv 2105.08584): a generator and latent made anew for each batch, class prior, "
        "feature statistics, disagreement where both decide alike, and contrast with earlier images. Ours: labels "
        "reach the generator too, 50 steps for 64 images (theirs up to 500), the temperature, our weights; feature "
        "statistics need a teacher with BatchNorm.",
        {
            "generator_objectives": {"asked": 1.0, "feature_statistics": 1.0, "boundary": 0.5, "contrast": 0.8},
            "generator_steps": 50,
            "student_steps": 50,
            "restart": "round",
            "learn_latent": True,
            "conditional": True,
            "images": "pool",
            "temperature": 4.0,
            "generator_lr": 3e-3,
        },
    )
)
register(
    Method(
        "fast",
        "Fang et al. 2022 (FastDFKD, arXiv 2112.06253): generator and latent learned in 5 steps from weights that are "
        "themselves learned to be a good start. Ours: Reptile's plain step towards where a round ended, where they "
        "have FOMAML or Reptile under Adam; a latent that begins anew in every round; labels reach the generator too; "
        "10 student steps per 64 new images (theirs 400 per 256), temperature 4 (theirs 20), our weights.",
        {
            "generator_objectives": {"asked": 0.5, "feature_statistics": 1.0, "boundary": 1.0},
            "generator_steps": 5,
            "student_steps": 10,
            "restart": "meta",
            "learn_latent": True,
            "conditional": True,
            "images": "pool",
            "temperature": 4.0,
            "generator_lr": 2e-3,
        },
    )
)
register(
    Method(
        "nayer",
        "Tran et al. 2024 (NAYER, arXiv 2310.00258): class vectors through noisy layers, random anew in each round, "
        "into a generator that lives for some rounds. Ours: random class vectors unless a subclass of Noisy gives "
        "embeddings of the class names (theirs: CLIP's); 20 steps per 64 images (theirs 40 per 400) and as many of "
        "the student, a life of 20 rounds (theirs 20), temperature 4 (theirs 20), our weights.",
        {
            "generator": "noisy",
            "generator_objectives": {"asked": 0.5, "feature_statistics": 1.0, "boundary": 1.0},
            "generator_steps": 20,
            "student_steps": 20,
            "restart": "noise",
            "life": 20,
            "conditional": True,
            "images": "pool",
            "temperature": 4.0,
            "generator_lr": 4e-3,
        },
    )
)
INVERSION = {  # a batch of pixels learned anew in each round, into the pool that the student learns from
    "generator": "pixels",
    "generator_steps": 100,
    "student_steps": 50,
    "restart": "round",
    "conditional": True,
    "images": "pool",
    "temperature": 4.0,
    "generator_lr": 0.2,
}
register(
    Method(
        "deepinversion",
        "Yin et al. 2020 (DeepInversion, arXiv 1912.08795): pixels learned by class prior, total variation and, where "
        "the teacher has BatchNorm, feature statistics; the adaptive form adds disagreement=1.0 (Jensen-Shannon) to "
        "the generator_objectives. Ours: 100 steps per batch (theirs 2,000 to 20,000), 50 of the student (they "
        "publish none), our weights.",
        {
            **INVERSION,
            "generator_objectives": {"asked": 1.0, "total_variation": 1.0, "feature_statistics": 1.0},
            "jitter": 0.125,
            "disagreement": "js",
        },
    )
)
register(
    Method(
        "psaq",
        "Li et al. 2022 (PSAQ-ViT, arXiv 2203.02250): pixels learned by patch-similarity entropy, class prior and "
        "total variation. They calibrate a quantised model; the student is ours, and so are 100 steps per batch "
        "(theirs 1,000), a total variation that is minimised (theirs is drawn to a random value), our weights.",
        {
            **INVERSION,
            "generator_objectives": {"asked": 1.0, "patch_entropy": 1.0, "total_variation": 1.0},
            "jitter": 0.125,
        },
    )
)
register(
    Method(
        "smi",
        "Hu et al. 2024 (SMI, arXiv 2510.27186): pixels learned by class prior and total variation, while the patches "
        "that the teacher's class token attends to least are dropped, down to 24 % and no fewer than four. Ours: 100 "
        "steps per batch (theirs 4,000) and 50 of the student (theirs 1), when the patches are dropped, our weights; "
        "the student, like the teacher that labels for it, sees whole images with the dropped patches blank, where "
        "theirs see fewer tokens.",
        {
            **INVERSION,
            "generator_objectives": {"asked": 1.0, "total_variation": 1.0},
            "keep_patches": 0.24,
        },
    )
)
register(
    Method(
        "noise",
        "The lower bound: the student learns on Gaussian noise that the teacher labels.",
        {
            "generator": "noise",
            "student_objectives": {"logits": 1.0, "tokens": 1.0},
            "student_loss": "mse",
            "shift": 0.0,
        },
    )
)
