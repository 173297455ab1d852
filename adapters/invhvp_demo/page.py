"""The report as one HTML page that needs nothing else: styles and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from invhvp.influence import evaluate

from .network import NetworkResult
from .study import L2, Study

_STYLE = """
:root { color-scheme: light; --blue: #1f6fb4; --red: #c8402f; --soft: #5b6470; --line: #e3e6ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1d2329;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 0 0 4px; }
p { margin: 8px 0; max-width: 76ch; }
.soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
          padding: 24px 26px; margin-top: 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px;
         margin-top: 22px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: .88rem; line-height: 1.35; display: block; }
img { max-width: 100%; height: auto; display: block; margin: 14px auto 4px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 8px 28px;
        align-items: center; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; margin: 14px 0 6px;
        font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: right; white-space: normal; vertical-align: bottom;
      color: var(--soft); font-weight: 600; border-bottom: 2px solid #cfd4da; }
th, td { padding: 6px 8px; } td { text-align: right; border-bottom: 1px solid var(--line); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
td:first-child { font-weight: 600; }
.good { color: var(--blue); } .bad { color: var(--red); } .good, .bad { font-weight: 600; }
a { color: var(--blue); } code { background: #eef0f3; border-radius: 4px; padding: 1px 5px; }
"""


def html(
    study: Study,
    pictures: Mapping[str, bytes],
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
) -> str:
    """The whole page; `headings` and `lines` are the table of methods."""
    parts = [
        _head(study),
        _tiles(study),
        _labels(pictures),
        _predictions(study, pictures),
        _check(study, pictures),
        _methods(study, pictures, headings, lines),
        _network(study),
        _data(study),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>invhvp: influence in handwritten digits</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(study: Study) -> str:
    n = len(study.digits.given)
    return (
        "<h1>Which labels are wrong, and which images hurt a prediction?</h1>"
        f'<p class="soft">{n:,} handwritten digits, {study.n_flipped} of them with a label that '
        "was flipped on purpose. A classifier was trained on all of them, not knowing which. "
        "Then one linear system with its Hessian told how much each training image moves each "
        "prediction, without training anything again.</p>"
    )


def _tiles(study: Study) -> str:
    wrong, exact = study.digits.wrong, study.exact
    found = int(wrong[study.suspects[: study.n_flipped]].sum())
    loo = study.leave_one_out
    auc = evaluate.mislabelled(exact.self_influence, wrong).auc
    tiles = [
        (f"{found} / {study.n_flipped}", f"wrong labels among the {study.n_flipped} most "
         "suspicious"),
        (f"{auc:.3f}", "probability that a wrong label looks "
         "more suspicious than a right one (AUC)"),
        (f"{loo.pearson:.4f}", f"correlation with {len(loo.index)} actual retrainings"),
        (f"{100 * study.test_accuracy:.1f} %", "test accuracy of the classifier"),
        (f"{sum(study.seconds.values()):.0f} s", f"for all of it on {study.backend}, "
         f"{study.device}"),
    ]  # fmt: skip
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _labels(pictures: Mapping[str, bytes]) -> str:
    return _section(
        "Which labels are wrong?",
        "<p>The training images with the largest self-influence g<sup>T</sup>(H + λI)"
        "<sup>−1</sup>g: how much each one props up its own label. Above each image: "
        'the label given in the data → the label predicted. <span class="bad">Red</span>: '
        "the label was really flipped. Grey: the label is right, the image is just hard.</p>"
        + _image(pictures, "suspects.png", "The most suspicious training images")
        + '<p class="soft">How far down the list one has to check to find all of them:</p>'
        + _image(pictures, "detection.png", "Wrong labels found over labels checked"),
    )


def _predictions(study: Study, pictures: Mapping[str, bytes]) -> str:
    n = len(study.digits.given)
    shown = "".join(
        _image(pictures, f"prediction-{i + 1}.png", f"Test image {image.index}, a {image.label}")
        for i, image in enumerate(study.test_images)
    )
    return _section(
        "Which images help or hurt this prediction?",
        "<p>Held-out images, half of them misread, and the training images that matter most for "
        'each: those whose presence <span class="good">lowers</span> its loss and those whose '
        'presence <span class="bad">raises</span> it. Above each: its label in the data (✗ where '
        "it was flipped) and its influence in nats; removing the image changes the loss by about "
        f"influence / {n:,}.</p>"
        + shown
        + '<p class="soft">All images at once: how much those of one label help (blue) or hurt '
        "(red) the predictions of another.</p>"
        + _image(pictures, "by-label.png", "Mean influence of each label on each label"),
    )


def _check(study: Study, pictures: Mapping[str, bytes]) -> str:
    loo = study.leave_one_out
    each = 2 * len(loo.index) // 5
    return _section(
        "Is that so? Influence against retraining",
        f'<div class="pair"><div><p>{len(loo.index)} training images were left out, one at a '
        f"time ({each} that should help most, {each} that should hurt most, "
        f"{len(loo.index) - 2 * each} at random), and the classifier was trained again each time "
        "until its gradient vanished to 1e-11. Each point compares the change of the mean test "
        "loss that influence predicted with the one that happened.</p>"
        f"<p>Pearson r = <b>{loo.pearson:.4f}</b>, slope {loo.slope:.3f}. A slope above 1 is "
        "expected: influence is the first-order term, and leaving an image out is a finite "
        "step.</p></div>"
        + _image(pictures, "leave-one-out.png", "Predicted against actual change of the loss")
        + "</div>"
        + '<p class="soft">And for each test image alone: do summed scores rank the models trained '
        f"on {len(study.lds.actual)} random halves of the data? The linear datamodelling score is "
        f"<b>{study.lds.score:.2f}</b>, 1 at best.</p>"
        + _image(pictures, "lds.png", "Rank correlation with retraining on random halves"),
    )


def _methods(
    study: Study,
    pictures: Mapping[str, bytes],
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    n = len(study.digits.given)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in study.notes)
    return _section(
        "What each method costs, and how well it answers",
        f"<p>Each method solved (A + λI)x = g for the gradients of all {n:,} training images, "
        f"with λ = {L2:g}, the L2 term of the training objective. <i>True residual</i> is the "
        "largest over all of them, for the method's own matrix A; <i>error</i> is the largest "
        "relative distance from the exact solution with the Hessian; <i>retraining r</i> is the "
        "correlation with the retrainings above.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        '</div><p class="soft">Methods with the empirical Fisher matrix solve another system, '
        "however exactly: their error is the price of that approximation.</p>"
        + notes
        + _image(pictures, "convergence.png", "Residual over operator-vector products")
        + '<p class="soft">Convergence for 16 test images at once. The dot is the true residual, '
        "computed afresh from the solution, with the products that this took.</p>",
    )


def _network(study: Study) -> str:
    net = study.network
    if net is None:
        return _section(
            "A neural network",
            f'<p class="soft">Not shown: {escape(study.network_missing or "")}.</p>',
        )
    return _section("A neural network", _network_text(net, study.n_flipped))


def _network_text(net: NetworkResult, flipped: int) -> str:
    rows = [
        ("test accuracy", f"{100 * net.test_accuracy:.1f} %"),
        ("mislabel AUC, self-influence with the empirical Fisher", f"{net.auc:.3f}"),
        (f"precision@{flipped} of the same", f"{net.precision:.2f}"),
        ("mislabel AUC, influence on the mean test loss with the Hessian", f"{net.test_auc:.3f}"),
        ("correlation of Hessian and Fisher influence on the test loss", f"{net.agreement:.3f}"),
        ("damping λ that made the Hessian positive definite", f"{net.damping:g}"),
        ("Hessian solve: status, products, true residual",
         f"{net.status}, {net.products:,}, {net.residual:.1e}"),
        *((f"seconds for {name}", f"{value:.2f}") for name, value in net.seconds.items()),
    ]  # fmt: skip
    body = "".join(
        f'<tr><td style="font-weight:400">{escape(name)}</td><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
    return (
        f"<p>The same data and questions for a network with {net.parameters:,} parameters, "
        "through the PyTorch adapter: Hessian products by automatic differentiation, per-sample "
        "gradients kept as outer products. Its loss is not convex, and retraining it ends in "
        "other minima, so that no leave-one-out check is made here.</p>"
        f'<div class="scroll"><table style="width:auto"><tbody>{body}</tbody></table></div>'
    )


def _data(study: Study) -> str:
    names = (
        "results.json", "methods.csv", "training_images.csv", "test_images.csv",
        "leave_one_out.csv", "convergence.csv",
    )  # fmt: skip
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in names)
    return _section(
        "The data behind this page",
        f"<p>{links}</p>"
        '<p class="soft">Digits: Alpaydin and Kaynak (1998), UCI Machine Learning Repository, '
        "as bundled with scikit-learn. Classifier: multinomial logistic regression with "
        f"{study.parameters} parameters and L2 term {L2:g}/2 ‖w‖², trained by Newton's method to a "
        f"gradient norm of {study.gradient_norm:.0e}. Influence: Koh and Liang (2017), equation "
        "2; positive is helpful.</p>",
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _image(pictures: Mapping[str, bytes], name: str, alt: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return f'<div><img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}"></div>'
