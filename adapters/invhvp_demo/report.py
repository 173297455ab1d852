"""The table on the terminal, and everything as JSON and CSV."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import invhvp as ih
from invhvp.influence import evaluate

from . import files, page, pictures
from .methods import Result
from .network import L2 as NETWORK_L2
from .study import L2, Study

SCHEMA = "invhvp-demo/1"

PASSING_R = 0.99  # of the exact method with actual retraining; below it something is broken


def passed(study: Study) -> bool:
    """Whether the exact method predicts what retraining does."""
    return study.leave_one_out.pearson >= PASSING_R


def columns(study: Study) -> tuple[str, ...]:
    """Headings of the table of methods."""
    return (
        "method", "curvature", "fit s", "solve s", "products", "true residual",
        "error vs exact", "mislabel AUC", f"precision@{study.n_flipped}", "retraining r",
    )  # fmt: skip


def table(study: Study) -> list[tuple[str, ...]]:
    """The table of methods, a line each, as text."""
    wrong = study.digits.wrong
    return [
        (
            result.label,
            result.curvature,
            f"{result.fit_seconds:.2f}",
            f"{result.solve_seconds:.2f}",
            f"{result.products:,}",
            f"{result.residual:.1e}",
            "reference" if result is study.exact else f"{result.error:.1e}",
            f"{found.auc:.3f}",
            f"{found.precision:.2f}",
            f"{study.retraining_r(result):.4f}",
        )
        for result in study.results
        for found in [evaluate.mislabelled(result.self_influence, wrong)]
    ]


def printed(study: Study) -> str:
    """The table and the answers in words, for a terminal."""
    lines = [columns(study), *table(study)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def row(cells: tuple[str, ...]) -> str:
        left = [c.ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True)]
        right = [c.rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    rule = "  ".join("─" * w for w in widths)
    return "\n".join(
        [row(lines[0]), rule, *map(row, lines[1:]), *study.notes, "", *_answers(study)]
    )


def _answers(study: Study) -> list[str]:
    wrong, first = study.digits.wrong, study.suspects[: study.n_flipped]
    loo, net = study.leave_one_out, study.network
    worst = study.test_images[0]
    lines = [
        f"Which labels are wrong?  {int(wrong[first].sum())} of the {len(first)} most suspicious "
        f"labels are among the {study.n_flipped} that were flipped.",
        f"What hurts a prediction?  Test image {worst.index}, a {worst.label} read as "
        f"{worst.predicted}: most harmful are training images "
        f"{', '.join(map(str, worst.harmful[:3]))}.",
        f"Is that so?  {len(loo.index)} retrainings, each without one image: "
        f"Pearson r = {loo.pearson:.4f}, slope {loo.slope:.2f}.",
    ]
    if net is None:
        return [*lines, f"A neural network is not shown: {study.network_missing}."]
    lines.append(
        f"A neural network?  {net.parameters} parameters through PyTorch: mislabel AUC "
        f"{net.auc:.3f}, precision@{study.n_flipped} {net.precision:.2f}."
    )
    return lines


def as_dict(study: Study) -> dict[str, Any]:
    """Everything as JSON-ready values; see the keys for what is what."""
    digits, wrong = study.digits, study.digits.wrong
    loo = study.leave_one_out
    return {
        "schema": SCHEMA,
        "passed": passed(study),
        "versions": {"python": platform.python_version(), "invhvp": ih.__version__, **_versions()},
        "settings": {
            "backend": study.backend,
            "device": study.device,
            "n_train": len(digits.given),
            "n_test": len(digits.test_labels),
            "n_flipped": study.n_flipped,
            "l2": L2,
        },
        "model": {
            "parameters": study.parameters,
            "gradient_norm": study.gradient_norm,
            "test_accuracy": study.test_accuracy,
        },
        "seconds": study.seconds,
        "methods": [_method(result, study) for result in study.results],
        "leave_one_out": {
            "pearson": loo.pearson,
            "slope": loo.slope,
            "unit": "change of the mean test loss in nats",
            "points": leave_one_out_rows(study),
        },
        "lds": {"score": study.lds.score, "interval": list(study.lds.interval)},
        "training_images": training_rows(study),
        "test_images": [
            {key: _plain(value) for key, value in vars(image).items()}
            for image in study.test_images
        ],
        "convergence": {name: sol.to_dict() for name, sol in study.histories.items()},
        "network": _network(study),
        "wrong_labels_found": int(wrong[study.suspects[: study.n_flipped]].sum()),
    }


def _network(study: Study) -> dict[str, Any]:
    if study.network is None:
        return {"missing": study.network_missing}
    per_image = ("self_influence", "test_scores", "predicted")
    shown = {k: v for k, v in vars(study.network).items() if k not in per_image}
    return {"l2": NETWORK_L2, **{key: _plain(value) for key, value in shown.items()}}


def _method(result: Result, study: Study) -> dict[str, Any]:
    wrong = study.digits.wrong
    found = evaluate.mislabelled(result.self_influence, wrong)
    per_image = ("self_influence", "test_scores")
    return {
        **{key: value for key, value in vars(result).items() if key not in per_image},
        "mislabel_auc": found.auc,
        "precision": found.precision,
        "mislabel_auc_by_test_loss": evaluate.mislabelled(-result.test_scores, wrong).auc,
        "retraining_pearson": study.retraining_r(result),
    }


def training_rows(study: Study) -> list[dict[str, Any]]:
    """Every training image, the most suspicious first."""
    digits, exact = study.digits, study.exact
    return [
        {
            "rank": rank,
            "index": int(i),
            "given": int(digits.given[i]),
            "predicted": int(study.predicted[i]),
            "true": int(digits.true[i]),
            "flipped": bool(digits.wrong[i]),
            "self_influence": float(exact.self_influence[i]),
            "influence_on_test_loss": float(exact.test_scores[i]),
        }
        for rank, i in enumerate(study.suspects, start=1)
    ]


def leave_one_out_rows(study: Study) -> list[dict[str, Any]]:
    """Every retraining: predicted and actual change of the mean test loss in nats."""
    loo = study.leave_one_out
    return [
        {"index": int(i), "flipped": bool(f), "predicted": float(p), "actual": float(a)}
        for i, f, p, a in zip(loo.index, loo.wrong, loo.predicted, loo.actual, strict=True)
    ]


def influence_rows(study: Study) -> list[dict[str, Any]]:
    """The most helpful and most harmful training images of each test image shown."""
    return [
        {
            "test_index": image.index, "test_label": image.label, "predicted": image.predicted,
            "side": side, "rank": rank, "train_index": int(i),
            "given": int(study.digits.given[i]), "influence": float(score),
        }
        for image in study.test_images
        for side, indices, scores in (
            ("helpful", image.helpful, image.helpful_scores),
            ("harmful", image.harmful, image.harmful_scores),
        )
        for rank, (i, score) in enumerate(zip(indices, scores, strict=True), start=1)
    ]  # fmt: skip


def convergence_rows(study: Study) -> list[dict[str, Any]]:
    """Every look at the iterative solves for 16 test images."""
    return [
        {
            "method": name, "iteration": record.iteration, "products": record.products,
            "seconds": record.seconds, "relative_residual": float(record.relative_residuals.max()),
        }
        for name, solution in study.histories.items()
        for record in solution.history
    ]  # fmt: skip


def save(study: Study, folder: Path) -> Path:
    """Write the pictures, the data and last of all the page, which shows them; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw_all(study)
    for name, png in drawn.items():
        files.write(folder / name, png)
    found = as_dict(study)
    files.write_json(folder / "results.json", found)
    methods = [{k: v for k, v in method.items() if k != "statuses"} for method in found["methods"]]
    for name, rows in {
        "methods.csv": methods,
        "training_images.csv": found["training_images"],
        "leave_one_out.csv": found["leave_one_out"]["points"],
        "test_images.csv": influence_rows(study),
        "convergence.csv": convergence_rows(study),
    }.items():
        files.write_csv(folder / name, rows)
    files.write(folder / "index.html", page.html(study, drawn, columns(study), table(study)))
    return folder / "index.html"


def _versions() -> Mapping[str, str]:
    found = {}
    for name in ("numpy", "scipy", "scikit-learn", "matplotlib", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
