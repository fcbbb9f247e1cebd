"""The page of an evaluation report: index.html from the content of report.json, complete in itself.

Everything can be read without JavaScript; with it tables sort and filter, one class's curve and a score threshold can
be chosen, and pictures open in place. Names of classes and files are text: they are escaped wherever they stand.
"""

import json
import math
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common import atomic_write
from report_pictures import COLORS

__all__ = ["write_page"]

TYPE_NAMES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
METRIC_WORDS = {
    "AP": "average precision, mean over IoU 0.5 to 0.95", "AP50": "average precision at IoU 0.5",
    "AP75": "average precision at IoU 0.75", "APs": "AP of small objects (below 32² pixels)",
    "APm": "AP of medium objects (32² to 96² pixels)", "APl": "AP of large objects (above 96² pixels)",
    "APr": "AP of rare classes (1 to 10 training images)", "APc": "AP of common classes (11 to 100)",
    "APf": "AP of frequent classes (above 100)", "mAP": "mean average precision at IoU 0.5",
    "AR": "average recall", "AR1": "average recall of 1 detection an image",
    "AR10": "average recall of 10 detections an image", "AR100": "average recall of 100 detections an image",
    "AR50": "recall at OKS 0.5", "AR75": "recall at OKS 0.75", "ARs": "average recall of small objects",
    "recall": "share of the objects that are found",
    "ARm": "average recall of medium objects", "ARl": "average recall of large objects",
}  # fmt: skip
ERROR_WORDS = {
    "class": "right place, wrong class", "localisation": "right class, place only roughly right (IoU 0.1 to 0.5)",
    "both": "wrong class and place only roughly right", "duplicate": "an object that was found already",
    "background": "nothing is there", "missed": "objects that nothing found",
    "false positive": "all wrong detections", "false negative": "all objects without a find",
}  # fmt: skip
KEYPOINT_WORDS = {
    "good": "similarity 0.85 or more", "jitter": "0.5 to 0.85", "inversion": "on the mirrored point of the same body",
    "swap": "on another body", "miss": "on none",
}  # fmt: skip
MOST_CONFUSED = 24  # classes in the matrix that is shown
LONG = 30  # rows from which a table scrolls in a window of its own


def write_page(out: Path, content: dict[str, Any]) -> None:
    with atomic_write(out / "index.html") as f:
        f.write(page(content))


def page(content: dict[str, Any]) -> str:
    """The whole HTML document."""
    models = content["models"]
    parts = [_head(content)]
    if len(models) > 1:
        parts += [_comparison(content, n) for n in range(len(content["comparisons"]))]
    for number in range(len(models)):
        parts.append(_model(content, number))
    parts.append(_data(content["data"]))
    title = f"{models[0]['name']} on {content['ground_truth']}"
    data = {
        "levels": models[0]["thresholds"]["levels"],
        "models": [
            {"counts": m["thresholds"]["classes"], "objects": m["thresholds"]["objects"],
             "curves": m["curves"]["classes"]} for m in models
        ],
    }  # fmt: skip
    # "<" would end the script element, whatever a class is called.
    blob = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    links = [("summary", "Summary")] + [(i, t) for i, t in _sections(content)]
    nav = "".join(f'<a href="#{i}">{escape(t)}</a>' for i, t in links)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><a class=skip href=#main>Skip to the report</a>"
        f'<nav aria-label="Sections">{nav}</nav><main id=main>{"".join(parts)}</main>'
        '<dialog id=viewer aria-label="Picture"><form method=dialog><button id=previous type=button>◀ previous</button>'
        '<button id=next type=button>next ▶</button><button>close</button></form><figure><img id=large alt="">'
        "<figcaption id=caption></figcaption></figure></dialog>"
        f'<script type="application/json" id=numbers>{blob}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _sections(content: dict[str, Any]) -> list[tuple[str, str]]:
    several = len(content["models"]) > 1
    sections = [("comparison-1", "Comparison")] if several else []
    names = [("classes", "Classes"), ("curves", "Curves"), ("thresholds", "Thresholds"), ("confusion", "Confusion"),
             ("errors", "Errors"), ("worst", "Worst images"), ("mistakes", "Mistakes")]  # fmt: skip
    if several:
        sections += [(f"model-{n + 1}", m["name"]) for n, m in enumerate(content["models"])]
    else:
        sections += [(f"{i}-1", t) for i, t in names]
    return [*sections, ("data", "Data")]


# ------------------------------------------------------------------------------------------------ pieces
def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}".replace(",", "\u202f")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _range(entry: dict[str, Any]) -> str:
    return "–" if entry.get("low") is None else f"{entry['low']:.3f} – {entry['high']:.3f}"


def _cell(value: Any, digits: int = 3) -> str:
    """A table cell of a number, with the exact value for sorting."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) or value is None:
        key = "" if value is None else repr(value)
        return f'<td class=n data-v="{key}">{_number(value, digits)}</td>'
    return f"<td>{escape(str(value))}</td>"


def _table(head: list[str], rows: list[list[str]], name: str, sortable: bool = True, filterable: bool = False) -> str:
    """rows: cells as HTML (`<td>…`). The first column is the row's header."""
    marks = (" data-sortable" if sortable else "") + (" data-filterable" if filterable else "")
    numeric = ["class=n" in cell or 'class="n' in cell for cell in rows[0]] if rows else [False] * len(head)
    heads = "".join(f"<th scope=col{' class=n' * n}>{escape(h)}</th>" for h, n in zip(head, numeric))
    long = " long" if len(rows) > LONG else ""
    body = "".join(
        "<tr>" + r[0].replace("<td", "<th scope=row", 1).replace("</td>", "</th>") + "".join(r[1:]) + "</tr>"
        for r in rows
    )
    return (
        f'<div class="scroll{long}" tabindex=0 role=region aria-label="{escape(name)}"><table{marks}>'
        f"<caption>{escape(name)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _bars(rows: list[tuple[str, float, str]], name: str) -> str:
    """Labelled horizontal bars: label, value, what stands at the end."""
    most = max((abs(v) for _, v, _ in rows), default=0) or 1
    lines = "".join(
        f"<tr><th scope=row>{escape(label)}</th>"
        f'<td class=bar><span style="width:{100 * abs(v) / most:.1f}%"></span></td>'
        f"<td class=n>{escape(end)}</td></tr>"
        for label, v, end in rows
    )  # fmt: skip
    return f"<table class=bars><caption>{escape(name)}</caption><tbody>{lines}</tbody></table>"


def _plot(lines: list[tuple[list[tuple[float, float]], str, str]], x: str, y: str, name: str, more: str = "") -> str:
    """An SVG chart of the unit square: (points, CSS class, label) each."""
    size, left, top = 300, 42, 10

    def place(px: float, py: float) -> str:
        return f"{left + px * size:.1f},{top + (1 - py) * size:.1f}"

    grid = "".join(
        f'<line class=grid x1={left} x2={left + size} y1={top + size * k / 5:.0f} y2={top + size * k / 5:.0f} />'
        f'<line class=grid y1={top} y2={top + size} x1={left + size * k / 5:.0f} x2={left + size * k / 5:.0f} />'
        f'<text x={left - 6} y={top + size * k / 5 + 4:.0f} text-anchor=end>{1 - k / 5:.1f}</text>'
        f'<text x={left + size * k / 5:.0f} y={top + size + 16} text-anchor=middle>{k / 5:.1f}</text>'
        for k in range(6)
    )  # fmt: skip
    drawn = "".join(
        f'<polyline class="{kind}" points="{" ".join(place(*p) for p in points)}">'
        f"<title>{escape(label)}</title></polyline>"
        for points, kind, label in lines
        if points
    )
    return (
        f'<svg class=plot viewBox="0 0 {left + size + 12} {top + size + 36}" role=img '
        f'aria-label="{escape(name)}"{more}>'
        f"{grid}{drawn}<text x={left + size / 2} y={top + size + 32} text-anchor=middle>{escape(x)}</text>"
        f'<text transform="translate(11 {top + size / 2}) rotate(-90)" text-anchor=middle>{escape(y)}</text></svg>'
    )


def _figure(entry: dict[str, Any], caption: str, wide: bool = True, mark: str = "", more: str = "") -> str:
    """mark: the id of the figure; more: HTML at the end of its caption."""
    size = f' width="{entry["width"]}" height="{entry["height"]}"' if "width" in entry else " width=224 height=224"
    source = quote(entry["picture"])
    kind = ("wide" if wide else "cut") + (f' id="{mark}"' if mark else "")
    return (
        f'<figure class={kind}><a class=zoom href="{source}"><img loading=lazy src="{source}"{size} '
        f'alt="{escape(caption)}"></a><figcaption>{escape(caption)}{more}</figcaption></figure>'
    )


# ------------------------------------------------------------------------------------------------ sections
def _head(content: dict[str, Any]) -> str:
    models, main = content["models"], content["iou_type"]
    rows = []
    for m in models:
        for kind, metrics in m["summary"].items():
            for name, entry in metrics.items():
                cells = [f'<td title="{escape(METRIC_WORDS.get(name, ""))}">{escape(name)}</td>']
                cells += [f"<td>{TYPE_NAMES.get(kind, kind)}</td>"]
                cells += [f"<td>{escape(m['name'])}</td>"] if len(models) > 1 else []
                cells += [_cell(entry["value"]), f"<td class=n>{_range(entry)}</td>"]
                cells += [f"<td>{escape(METRIC_WORDS.get(name, ''))}</td>"]
                rows.append(cells)
    head = ["metric", "of", *(["results"] if len(models) > 1 else []), "value", "95 % interval", "meaning"]
    tiles = []
    for m in models:
        for name, entry in list(m["summary"][main].items())[:2]:
            label = f"{name} of {TYPE_NAMES[main]}" + (f", {m['name']}" if len(models) > 1 else "")
            tiles.append(f"<li><b>{_number(entry['value'])}</b><span>{escape(label)}</span>"
                         f"<small>{_range(entry)}</small></li>")  # fmt: skip
    lead = models[0]["errors"]
    worst = sorted(
        ((k, v) for k, v in lead["cost"].items() if not k.startswith("false")), key=lambda item: -(item[1] or 0)
    )
    if worst and worst[0][1]:
        kind, lost = worst[0]
        label = f"AP50 lost to the costliest kind of error: {kind}" + (
            f", {models[0]['name']}" if len(models) > 1 else ""
        )
        tiles.append(f"<li><b>{_number(lost)}</b><span>{escape(label)}</span><small>{ERROR_WORDS[kind]}</small></li>")
    data, classes = content["data"], len(content["classes"])
    sample = content["bootstrap"]
    missing = content["pictures"].get("missing")
    note = f"<p class=note>{missing} images were not found, so they are not shown.</p>" if missing else ""
    return (
        f"<header id=summary><h1>{escape(', '.join(m['name'] for m in models))}</h1>"
        f"<p>{escape(content['protocol'])} scores on <b>{escape(content['ground_truth'])}</b>: "
        f"{_number(data['images'])} images, {_number(data['objects'])} objects, "
        f"{_number(classes)} class{'es' * (classes != 1)}. "
        f"Curves, errors and pictures are about {TYPE_NAMES[main]}.</p><ul class=tiles>{''.join(tiles)}</ul>{note}"
        f"{_table(head, rows, 'Summary', sortable=False)}"
        f"<p class=note>Intervals: bootstrap over images, {sample['resamples']} resamples, seed {sample['seed']}. All "
        "numbers are in <a href=report.json>report.json</a>.</p></header>"
    )


def _model(content: dict[str, Any], number: int) -> str:
    model, main = content["models"][number], content["iou_type"]
    n = number + 1
    parts = [_classes(content, model, main, n), _slices(model, n), _curves(content, model, n)]
    parts += [_thresholds(content, model, n), _confusion(content, model, n), _errors(model, n)]
    parts += [_masks(model), _keypoints(model), _proposals(model)]
    pictures = content["pictures"]
    if number < len(pictures["worst"]):
        worst = pictures["worst"][number]
        parts += [_worst(worst, n), _mistakes(pictures["mistakes"][number], worst, n)]
    else:
        parts.append("<section><p class=note>No pictures: the folder of the images was not given.</p></section>")
    if len(content["models"]) == 1:
        return "".join(parts)
    body = "".join(parts)
    opened = " open" if number == 0 else ""
    return (
        f"<details class=model id=model-{n}{opened}><summary><h2>{escape(model['name'])}</h2></summary>{body}</details>"
    )


def _classes(content, model, main, n) -> str:
    known = model["classes"][0].get(main, {}) if model["classes"] else {}
    metrics = [m for m in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AR", "mAP") if m in known]
    others = [k for k in model["summary"] if k != main]
    head = ["class", "objects", "images", "detections", *metrics, "95 % interval"]
    head += [f"{next(iter(model['summary'][k]))} of {TYPE_NAMES[k]}" for k in others]
    head += ["best F1", "at score", "missed", "AP50 lost"]
    rows = []
    for c in model["classes"]:
        best = c["best_f1"] or {}
        own = c[main]
        low = own["low"]
        cells = [_cell(c["name"]), _cell(c["objects"]), _cell(c["images"]), _cell(c["detections"])]
        cells += [_cell(own[m]) for m in metrics]
        bounds = "" if low is None else repr(low)
        cells.append(f'<td class=n data-v="{bounds}">{_range(own)}</td>')
        cells += [_cell(c[k][next(iter(model["summary"][k]))]) for k in others]
        cells += [_cell(best.get("f1")), _cell(best.get("threshold")), _cell(c["missed"]), _cell(c["lost"], 4)]
        rows.append(cells)
    return (
        f"<section id=classes-{n}><h2>Classes</h2>{_table(head, rows, 'Scores by class', filterable=True)}"
        "<p class=note>AP50 lost: what the mistakes of the class cost, in the mean over classes, to first order.</p>"
        "</section>"
    )


def _slices(model, n) -> str:
    rows = []
    for s in model["crowdedness"]:
        name = f"{s['from']} to {s['to']}" if s["to"] else f"{s['from']} or more"
        rows.append([_cell(name), _cell(s["images"]), _cell(s["objects"]), _cell(s["AP"]),
                     f"<td class=n>{_range(s)}</td>"])  # fmt: skip
    table = _table(["objects in an image", "images", "objects", "AP", "95 % interval"], rows, "By crowdedness", False)
    words = {"s": "small (below 32² pixels)", "m": "medium (32² to 96²)", "l": "large (above 96²)"}
    sizes = [
        [_cell(words[e["size"]]), f"<td>{TYPE_NAMES[e['of']]}</td>", _cell(e["objects"]), _cell(e["value"]),
         f"<td class=n>{_range(e)}</td>"] for e in model["sizes"]
    ]  # fmt: skip
    metric = model["sizes"][0]["metric"]
    more = _table(["size of objects", "of", "objects", metric, "95 % interval"], sizes, "By size", False)
    return f"<section id=slices-{n}><h2>Size and crowdedness</h2><div class=pair>{more}{table}</div></section>"


def _class_options(content: dict[str, Any]) -> str:
    return "".join(f'<option value="{k}">{escape(name)}</option>' for k, name in enumerate(content["classes"]))


def _curves(content, model, n) -> str:
    curves = model["curves"]
    axis = [k / 100 for k in range(101)]
    lines = [(list(zip(axis, curves["mean"])), "mean", "mean over classes")] if curves["mean"] else []
    thin = [c for c in curves["classes"] if c][:100]
    lines = [(list(zip(axis, c)), "thin", "a class") for c in thin] + lines
    plot = _plot(lines, "recall", "precision", "Precision and recall at IoU 0.5: every class, and their mean",
                 f' data-curves="{n - 1}"')  # fmt: skip
    options = f'<option value="">none</option>{_class_options(content)}'
    pick = f'<p class=js><label>Class <select data-curve="{n - 1}">{options}</select></label></p>'
    cal = model["calibration"]
    points = [(b["score"], b["right"]) for b in cal["bins"] if b["count"]]
    second = _plot([([(0, 0), (1, 1)], "ideal", "ideal"), (points, "mean", "measured")], "score", "share that is right",
                   "Calibration: how often detections of a score are right")  # fmt: skip
    rows = [[_cell(f"{b['from']:.1f} to {b['to']:.1f}"), _cell(b["count"]), _cell(b["score"]), _cell(b["right"])]
            for b in cal["bins"]]  # fmt: skip
    return (
        f"<section id=curves-{n}><h2>Precision, recall and calibration</h2><div class=pair><div>{plot}{pick}"
        "<p class=note>At IoU 0.5. The thick line is the mean over classes.</p></div>"
        f"<div>{second}<p class=note>Expected calibration error {_number(cal['error'])}. Below the diagonal, scores "
        "promise too much.</p></div></div><details><summary>Calibration as a table</summary>"
        f"{_table(['score', 'detections', 'mean score', 'share that is right'], rows, 'Calibration')}"
        "</details></section>"
    )


def _thresholds(content, model, n) -> str:
    best = model["thresholds"]["best"]
    lead = "There is no object to be found." if not best else (
        f"Over all classes F1 is best, {best['f1']:.3f}, at a score of {best['threshold']:.3f}: precision "
        f"{best['precision']:.3f}, recall {best['recall']:.3f}.")  # fmt: skip
    rows = [
        [_cell(t["threshold"], 2), _cell(t["precision"]), _cell(t["recall"]), _cell(t["f1"]), _cell(t["right"]),
         _cell(t["wrong"])] for t in model["thresholds"]["table"]
    ]  # fmt: skip
    start = min(0.99, math.floor(100 * best["threshold"]) / 100) if best else 0.5  # the slider's next below
    chooser = (
        f'<div class=js data-threshold="{n - 1}"><p><label>Score threshold <input type=range min=0 max=0.99 step=0.01 '
        f'value="{start:.2f}"></label> <output></output> <label>Class <select><option value="">all</option>'
        f"{_class_options(content)}</select></label></p><div class=out aria-live=polite></div></div>"
    )
    return (
        f"<section id=thresholds-{n}><h2>Score thresholds</h2><p>{lead}</p>{chooser}"
        f"{_table(['score from', 'precision', 'recall', 'F1', 'right', 'wrong'], rows, 'All classes, at IoU 0.5')}"
        "</section>"
    )


def _confusion(content, model, n) -> str:
    names, entries = content["classes"], model["confusion"]["matrix"]
    count = len(names)
    labels = [*names, "background"]
    weight = [0] * count
    for row, column, number in entries:
        if row != column:
            for k in (row, column):
                if k < count:
                    weight[k] += number
    shown = sorted(range(count), key=lambda k: -weight[k])[:MOST_CONFUSED]
    shown = [*sorted(shown), count]
    cells = {(r, c): v for r, c, v in entries}
    totals: dict[int, int] = {}
    for r, _, v in entries:
        totals[r] = totals.get(r, 0) + v
    rows = []
    for r in shown:
        line = [_cell("invented" if r == count else labels[r])]
        for c in shown:
            v = cells.get((r, c), 0)
            share = v / totals[r] if totals.get(r) else 0
            good = "hit" if r == c else "off"
            line.append(f'<td class="n {good}" style="--s:{share:.2f}" data-v="{v}">{v or ""}</td>')
        rows.append(line)
    head = ["annotated ↓ detected →", *("missed" if c == count else labels[c] for c in shown)]
    pairs = sorted(((v, r, c) for r, c, v in entries if r != c and r < count and c < count), reverse=True)[:30]
    most = [[_cell(labels[r]), _cell(labels[c]), _cell(v), _cell(v / max(1, totals.get(r, 0)))] for v, r, c in pairs]
    left = f" The {len(shown) - 1} classes with most mistakes of {count}." if count > len(shown) - 1 else ""
    confused = _table(["annotated", "taken for", "times", "share of the class"], most, "Most confused") if most else (
        "<p>No class was taken for another.</p>")  # fmt: skip
    return (
        f"<section id=confusion-{n}><h2>Confusion</h2><p>Detections with a score of "
        f"{model['confusion']['threshold']:.3f} or more, at IoU 0.5.{left}</p><div class=matrix>"
        f"{_table(head, rows, 'Confusion matrix', sortable=False)}</div>{confused}</section>"
    )


def _errors(model, n) -> str:
    errors = model["errors"]
    kinds = ["class", "localisation", "both", "duplicate", "background", "missed"]
    bars = _bars(
        [(k, errors["cost"][k] or 0, f"{_number(errors['cost'][k])}") for k in kinds], "AP50 that each kind costs"
    )
    rows = [[_cell(k), _cell(errors["cost"][k]), _cell(errors["count"][k]), f"<td>{ERROR_WORDS[k]}</td>"]
            for k in [*kinds, "false positive", "false negative"]]  # fmt: skip
    return (
        f"<section id=errors-{n}><h2>Errors by cost</h2><p>What AP at IoU 0.5 ({_number(errors['ap50'])}) would gain "
        f"without each kind of error, as in TIDE. The gains do not add up.</p>{bars}"
        f"{_table(['error', 'AP50 lost', 'count', 'meaning'], rows, 'Errors')}</section>"
    )


def _masks(model) -> str:
    m = model.get("masks")
    if not m:
        return ""
    rows = [["mean mask IoU", m["iou"]], ["mask AP of these pairs", m["ap"]], ["mean boundary IoU", m["boundary_iou"]],
            ["mean of the smaller of mask IoU and boundary IoU", m["boundary_min_iou"]]]  # fmt: skip
    rows += [[f"share with mask IoU of {t} or more", v] for t, v in m["share_at"].items()]
    table = _table(
        ["where the box is right (IoU 0.5)", "value"], [[_cell(a), _cell(b)] for a, b in rows], "Masks", False
    )
    return (
        f"<section><h2>Mask quality</h2><p>{_number(m['pairs'])} detections whose box finds an object; boundary IoU "
        f"measured on {_number(m['boundary_pairs'])} of them.</p>{table}</section>"
    )


def _keypoints(model) -> str:
    k = model.get("keypoints")
    if not k:
        return ""
    kinds = list(k["all"])
    rows = [[_cell(p["name"]), *(_cell(p[kind]) for kind in kinds)] for p in k["by_point"]]
    rows.append([_cell("all"), *(_cell(k["all"][kind]) for kind in kinds)])
    words = "; ".join(f"{kind}: {KEYPOINT_WORDS[kind]}" for kind in kinds)
    table = _table(["point", *kinds], rows, "Points of found objects")
    return f"<section><h2>Keypoint errors</h2>{table}<p class=note>{words}.</p></section>"


def _proposals(model) -> str:
    p = model.get("proposals")
    if not p:
        return ""
    rows = [[_cell(k.split("/")[-1]), _cell(v)] for k, v in p.items()]
    return f"<section><h2>Proposals</h2>{_table(['recall', 'value'], rows, 'Recall of proposals', False)}</section>"


def _worst(entries, n) -> str:
    if not entries:
        return ""
    figures = []
    for k, e in enumerate(entries):
        kinds = ", ".join(f"{v} {k}" for k, v in e["mistakes"].items()) or "no mistake above the threshold"
        figures.append(_figure(e, f"{e['file']} (id {e['image_id']}): {kinds}; AP50 lost {e['lost']:.4f}",
                               mark=f"worst-{n}-{k}"))  # fmt: skip
    return (
        f"<section id=worst-{n}><h2>Worst images</h2><p>By what their mistakes cost. Left the ground truth, right the "
        "detections; every mistake is named.</p><p class=legend>" + _legend() + f"</p>{''.join(figures)}</section>"
    )


def _legend() -> str:
    keys = ["right", "class", "localisation", "both", "duplicate", "background", "missed", "ignored"]
    return " ".join(f'<span><i style="background:rgb{COLORS[k][::-1]}"></i>{k}</span>' for k in keys)


def _mistakes(entries, worst, n) -> str:
    if not entries:
        return ""
    whole = {str(e["image_id"]): f' <a href="#worst-{n}-{k}">whole image</a>' for k, e in enumerate(worst)}
    by_class: dict[str, list] = {}
    for e in entries:
        by_class.setdefault(e["class"], []).append(e)
    words = {"invented": "most confident of nothing", "confused": "of the wrong class", "misplaced": "misplaced",
             "missed": "missed, the largest"}  # fmt: skip
    blocks = []
    for name, items in by_class.items():
        rows = []
        for kind, word in words.items():
            cut = [
                _figure(e, f"{e['text']} – {e['file']}", wide=False, more=whole.get(str(e["image_id"]), ""))
                for e in items if e["kind"] == kind
            ]  # fmt: skip
            if cut:
                rows.append(f"<h4>{word}</h4><div class=cuts>{''.join(cut)}</div>")
        blocks.append(f"<details data-name=\"{escape(name)}\"><summary>{escape(name)} ({len(items)})</summary>"
                      f"{''.join(rows)}</details>")  # fmt: skip
    return (
        f"<section id=mistakes-{n}><h2>Mistakes by class</h2><p class=js><label>Find a class "
        f'<input type=search data-find="mistakes-{n}"></label></p>{"".join(blocks)}</section>'
    )


def _comparison(content, k) -> str:
    c = content["comparisons"][k]
    rows = []
    for kind, metrics in c["summary"].items():
        for name, e in metrics.items():
            rows.append([_cell(name), f"<td>{TYPE_NAMES[kind]}</td>", *_change(e)])
    head = ["metric", "of", c["first"], c["second"], "difference", "95 % interval", "p"]
    classes = [[_cell(e["name"]), *_change(e)] for e in sorted(c["classes"], key=lambda e: -abs(e["difference"]))]
    images = [
        [_cell(i["file"]), _cell(str(i["image_id"])), _signed_cell(i["change"])] for i in c["images"]
    ]  # fmt: skip
    pictures = content["pictures"]["compared"]
    figures = ""
    if k < len(pictures):
        figures = "".join(
            _figure(e, f"{e['file']} (id {e['image_id']}): AP50 {_signed(e['gain'])}") for e in pictures[k]
        )
    n = k + 1
    return (
        f"<section id=comparison-{n}><h2>{escape(c['first'])} and {escape(c['second'])}</h2>"
        f"<p>Differences are {escape(c['second'])} less {escape(c['first'])}; paired bootstrap over the same images. "
        f"{c['better']} images got better, {c['worse']} worse. Of many classes one in twenty is marked by "
        f"chance.</p>{_table(head, rows, 'Differences', False)}"
        f"<details><summary>By class</summary>"
        f"{_table(['class', *head[2:]], classes, 'Differences by class', True, True)}"
        f"</details><details><summary>Images that changed most</summary>"
        f"{_table(['file', 'image id', 'AP50 won'], images, 'Images', True, True)}{figures}</details></section>"
    )


def _change(e: dict[str, Any]) -> list[str]:
    sure = e["p"] is not None and e["p"] < 0.05
    kind = (" up" if e["difference"] > 0 else " down") if sure else ""
    bounds = "–" if e["low"] is None else f"{_signed(e['low'])} to {_signed(e['high'])}"
    mark = " significant" if sure else ""
    p = "" if e["p"] is None else e["p"]
    return [
        _cell(e["first"]), _cell(e["second"]), _signed_cell(e["difference"], kind), f"<td class=n>{bounds}</td>",
        f'<td class=n data-v="{p}">{_number(e["p"])}{mark}</td>',
    ]  # fmt: skip


def _signed_cell(value: float | None, kind: str = "") -> str:
    key = "" if value is None else repr(value)
    return f'<td class="n{kind}" data-v="{key}">{_signed(value)}</td>'


def _data(data: dict[str, Any]) -> str:
    sides = [(f"{s['from']} to {s['to']}" if s["to"] else f"{s['from']} or more", s["count"], _number(s["count"]))
             for s in data["sides"]]  # fmt: skip
    bars = _bars(sides, "Objects by size (square root of the box's area, pixels)")
    per_image = data["objects_per_image"]
    text = (
        f"{_number(data['images'])} images, {_number(data['images_without_objects'])} of them without an object; "
        f"{_number(per_image['mean'], 1)} objects an image on average, {per_image['most']} at most; "
        f"{_number(data['ignored_regions'])} ignored regions. "
        "The table of scores by class counts the objects and images of each."
    )
    anchors = data.get("anchors")
    more = ""
    if anchors:
        rows = [(f"{k / 10:.1f} to {(k + 1) / 10:.1f}", v, _number(v)) for k, v in enumerate(anchors["histogram"])]
        classes = [[_cell(c["name"]), _cell(c["count"])] for c in anchors["unmatched_by_class"]]
        by_side = [
            [_cell(name), _cell(count), _cell(lost["count"])]
            for (name, count, _), lost in zip(sides, anchors["unmatched_by_side"]) if count
        ]  # fmt: skip
        more = (
            f"<h3>Anchors</h3><p>Of {_number(anchors['objects'])} objects {_number(anchors['fit'])} have an anchor "
            f"that overlaps them by an IoU of {anchors['positive_iou']} or more; {_number(anchors['unmatched'])} have "
            f"none that reaches {anchors['negative_iou']}: training matches these with their best anchor alone.</p>"
            + _bars(rows, "Objects by the IoU of their best anchor")
        )
        if anchors["unmatched"]:
            head = ["size in pixels", "objects", "without an anchor"]
            more += _table(head, by_side, "Without an anchor, by size", False)
            more += _table(["class", "objects without an anchor"], classes, "Without an anchor, by class")
    return f"<section id=data><h2>Data</h2><p>{text}</p>{bars}{more}</section>"


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1d21;--soft:#f1f3f5;--line:#d0d5da;--mute:#5a636c;--main:#0b62c4;
--good:#1a7f37;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--soft:#20252a;--line:#3a424a;--mute:#9aa4ae;
--main:#6cb0ff;--good:#56c271;--bad:#ff8a7a}}
*{box-sizing:border-box}html{scroll-padding-top:3.2rem}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:3;display:flex;gap:.2rem;overflow-x:auto;background:var(--bg);
border-bottom:1px solid var(--line);padding:.3rem 1rem}
nav a{white-space:nowrap;padding:.3rem .6rem;border-radius:.4rem;text-decoration:none;color:var(--fg)}
nav a:hover{background:var(--soft)}a{color:var(--main)}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.4rem;z-index:9;background:var(--bg);padding:.3rem}
:focus-visible{outline:3px solid var(--main);outline-offset:1px}
main{max-width:82rem;margin:auto;padding:0 1rem 4rem}
section,header{padding-top:1rem}h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:1rem 0 .4rem}
h3{font-size:1rem}h4{margin:.6rem 0 .2rem;font-weight:600}
.note,caption,figcaption,small{color:var(--mute);font-size:.86rem}caption{text-align:left;padding:.2rem 0}
.tiles{list-style:none;display:flex;flex-wrap:wrap;gap:.6rem;padding:0}
.tiles li{background:var(--soft);border-radius:.5rem;padding:.6rem .9rem;display:grid;max-width:20rem}
.tiles b{font-size:1.6rem;line-height:1.2}
.scroll{overflow-x:auto;max-width:100%}.long{max-height:34rem;overflow-y:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.22rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{position:sticky;top:0;background:var(--bg);z-index:1;white-space:nowrap}
tbody th{font-weight:500;min-width:6rem;max-width:22rem}
td{overflow-wrap:normal;max-width:26rem}.scroll table{width:max-content}.n{text-align:right;white-space:nowrap}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:3px solid var(--main)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.up{color:var(--good)}.down{color:var(--bad)}
.bars{width:100%;max-width:40rem}.bars .bar{width:60%}.bars span{display:block;height:1.1em;background:var(--main);
border-radius:2px}
.pair{display:flex;flex-wrap:wrap;gap:1.5rem}.pair>*{flex:1 1 20rem;min-width:0;max-width:100%}
.plot{width:100%;max-width:28rem;height:auto}.plot text{fill:var(--mute);font-size:11px}
.plot .grid{stroke:var(--line);stroke-width:.6}.plot polyline{fill:none}
.plot .thin{stroke:var(--mute);stroke-opacity:.28;stroke-width:1}
.plot .mean{stroke:var(--main);stroke-width:2.6}.plot .ideal{stroke:var(--mute);stroke-dasharray:4 4}
.plot .chosen{stroke:var(--bad);stroke-width:2.2}
.matrix th{max-width:9rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.matrix thead th:first-child{max-width:none}
.hit{background:color-mix(in srgb,var(--good) calc(var(--s)*60%),transparent)}
.off{background:color-mix(in srgb,var(--bad) calc(var(--s)*70%),transparent)}
figure{margin:.6rem 0}figure img{max-width:100%;height:auto;display:block;border-radius:.3rem;background:var(--soft)}
.cuts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.6rem}.cuts figure{margin:0}
.legend span{margin-right:.9rem;white-space:nowrap}.legend i{display:inline-block;width:.9em;height:.9em;
border-radius:2px;margin-right:.3em;vertical-align:-1px}
summary{cursor:pointer;padding:.25rem 0}summary h2{display:inline}
input[type=range]{width:min(24rem,60vw);vertical-align:middle}
input[type=search],select{font:inherit;padding:.2rem .4rem;max-width:100%}
[data-threshold] label+*{margin-right:1rem}.js{display:none}.scripted .js{display:block}
dialog{width:min(96vw,84rem);border:1px solid var(--line);border-radius:.5rem;background:var(--bg);color:var(--fg)}
dialog::backdrop{background:#000a}dialog img{max-height:80vh;width:auto;margin:auto}
dialog button,.tool button{font:inherit;padding:.3rem .7rem;margin-right:.4rem}
@media(max-width:40rem){dialog figure{overflow-x:auto}dialog img{max-width:none;height:55vh;margin:0}}
@media(max-width:30rem){th,td{padding:.2rem .35rem}tbody th{max-width:9rem}}
@media print{nav,.js,dialog{display:none!important}.scroll{max-height:none;overflow:visible}}
"""

SCRIPT = r"""
"use strict";
document.documentElement.classList.add("scripted");
const data = JSON.parse(document.getElementById("numbers").textContent);
const key = cell => {
  const v = cell.dataset.v;
  return v === undefined ? cell.textContent.trim() : v === "" ? null : +v;
};
const order = (a, b, up) => {
  if (a === null || b === null) return (a === null) - (b === null);
  const c = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  return up ? c : -c;
};
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = head.textContent; head.replaceChildren(button);
    button.addEventListener("click", () => {
      const body = table.tBodies[0], rows = [...body.rows];
      const numeric = rows.length > 0 && rows[0].cells[i].dataset.v !== undefined;
      const now = head.getAttribute("aria-sort");
      const up = now ? now === "descending" : !numeric;
      heads.forEach(h => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.map(r => [key(r.cells[i]), r]).sort((x, y) => order(x[0], y[0], up)).forEach(x => body.append(x[1]));
    });
  });
}
for (const table of document.querySelectorAll("table[data-filterable]")) {
  const make = name => document.createElement(name);
  const line = make("p"), label = make("label"), input = make("input"), count = make("output");
  input.type = "search"; label.append("Filter ", input); line.append(label, " ", count);
  table.parentElement.before(line);
  input.addEventListener("input", () => {
    const want = input.value.toLowerCase(); let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(want);
      shown += !row.hidden;
    }
    count.textContent = want ? shown + " of " + table.tBodies[0].rows.length : "";
  });
}
for (const input of document.querySelectorAll("[data-find]")) {
  const blocks = document.querySelectorAll("#" + input.dataset.find + " details");
  input.addEventListener("input", () => {
    const want = input.value.toLowerCase();
    for (const b of blocks) b.hidden = !b.dataset.name.toLowerCase().includes(want);
  });
}
for (const select of document.querySelectorAll("[data-curve]")) {
  select.addEventListener("change", () => {
    const plot = document.querySelector('[data-curves="' + select.dataset.curve + '"]');
    plot.querySelectorAll(".chosen").forEach(e => e.remove());
    const curve = select.value === "" ? null : data.models[+select.dataset.curve].curves[+select.value];
    if (!curve) return;
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("class", "chosen");
    line.setAttribute("points", curve.map((p, k) => (42 + 3 * k) + "," + (10 + 300 * (1 - p)).toFixed(1)).join(" "));
    plot.append(line);
  });
}
for (const part of document.querySelectorAll("[data-threshold]")) {
  const model = data.models[+part.dataset.threshold], slider = part.querySelector("input");
  const select = part.querySelector("select");
  const show = (v) => Number.isFinite(v) ? v.toFixed(3) : "–";
  const update = () => {
    const level = Math.round(slider.value * 100);
    part.querySelector("output").textContent = (level / 100).toFixed(2);
    let right = 0, wrong = 0, objects = 0;
    model.counts.forEach((c, k) => {
      if (select.value !== "" && +select.value !== k) return;
      right += c.right[level]; wrong += c.wrong[level]; objects += model.objects[k];
    });
    part.querySelector(".out").textContent = "precision " + show(right / (right + wrong)) + ", recall " +
      show(right / objects) + ", F1 " + show(2 * right / (right + wrong + objects)) + " (" + right + " right, " +
      wrong + " wrong, " + Math.round(objects - right) + " missed)";
  };
  slider.addEventListener("input", update); select.addEventListener("change", update); update();
}
const viewer = document.getElementById("viewer"), links = [...document.querySelectorAll("a.zoom")];
let at = 0;
const open = i => {
  at = (i + links.length) % links.length;
  const img = links[at].querySelector("img");
  document.getElementById("large").src = links[at].href;
  document.getElementById("large").alt = img.alt;
  document.getElementById("caption").textContent = img.alt;
  if (!viewer.open) viewer.showModal();
};
links.forEach((link, i) => link.addEventListener("click", e => { e.preventDefault(); open(i); }));
document.getElementById("previous").addEventListener("click", () => open(at - 1));
document.getElementById("next").addEventListener("click", () => open(at + 1));
viewer.addEventListener("keydown", e => {
  if (e.key === "ArrowLeft") open(at - 1);
  if (e.key === "ArrowRight") open(at + 1);
});
addEventListener("hashchange", () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
});
"""
