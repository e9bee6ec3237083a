"""The methods for detectors, as settings of the same loop as the classifiers' (`vitkd_fast.methods`)."""

from typing import Any

from vitkd_fast.methods import Method, register

SET: dict[str, Any] = {"found": 1.0, "placed": 5.0, "overlap": 2.0}  # Carion et al. 2020 (DETR)
# With the tokens at 1 a student had 19 % mAP50 after 1,000 steps, at 10 45 %, at 30 66 %, at 100 67 % (digit scenes).
STUDENT: dict[str, Any] = {"student_objectives": {**SET, "tokens": 30.0, "covered": 1.0}}

register(
    Method(
        "best",
        "Ours: scenes that a program draws (vitkd_fast.detection.scene_generator), of three the one in which the "
        "teacher finds most; the student's queries are matched to what it finds, its patch tokens to the teacher's; "
        "its patches learn what is found there.",
        {**STUDENT, "generator": "scenes", "images": "pool", "pool": 20_480, "candidates": 3},
    ),
    task="detection",
)
register(
    Method(
        "adversarial",
        "Habib et al. 2024 (arXiv 2408.05952) in structure: a generator that looks for images on which the student's "
        "boxes and classes are not the teacher's, among those in which the teacher is sure of objects. The paper "
        "gives no form and no number; these are ours.",
        {
            **STUDENT,
            "generator_objectives": {"unlike": 0.3, "sure": 1.0, "total_variation": 1.0},
            "replay": 0.5,
            "generators": 4,
        },
    ),
    task="detection",
)
register(
    Method(
        "inversion",
        "Pixels learned until the teacher finds boxes and classes drawn at random, with total variation, as zero-shot "
        "quantisation makes its images for detectors (arXiv 2507.16782). They calibrate; the student is ours, and so "
        "are 100 steps per batch and 50 of the student.",
        {
            **STUDENT,
            "generator": "pixels",
            "generator_objectives": {"objects": 1.0, "total_variation": 1.0},
            "generator_steps": 100,
            "student_steps": 50,
            "restart": "round",
            "images": "pool",
            "generator_lr": 0.2,
        },
    ),
    task="detection",
)
register(
    Method(
        "noise",
        "The lower bound: the student learns on Gaussian noise that the teacher labels.",
        {**STUDENT, "generator": "noise", "shift": 0.0},
    ),
    task="detection",
)
