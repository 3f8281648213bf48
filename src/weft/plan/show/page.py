"""What a search found, or what one layout is like, as one HTML page that needs nothing else. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from weft.config.load import make_config
from weft.plan.advice import Answer, tightly
from weft.plan.machine import Cluster
from weft.plan.numbers import Job
from weft.plan.plan import Plan
from weft.plan.schedules import ScheduleReport, modelled_costs
from weft.plan.search import Search
from weft.plan.show.findings import asked, counted, left, memory_of, refusal
from weft.plan.show.markup import Child, Element, page, section, table, tag
from weft.plan.show.pareto import Pareto
from weft.plan.show.places import draw_places
from weft.plan.show.schedule_view import headline, summary
from weft.plan.show.waterfall import Part, memory_parts, slower, time_parts, why_slower
from weft.schedules.picture import draw_svg
from weft.units import duration, gibibytes, percent, short

STYLE, SCRIPT = (Path(__file__).parent / "page_assets" / name for name in ("page.css", "page.js"))
SHOWN = 3
"""Plans whose parts are drawn."""
FAMILY = {
    **dict.fromkeys(("matmul", "attention", "elementwise", "head", "weights"), "work"),
    **dict.fromkeys(("recompute", "optimizer", "gradients"), "more"),
    **dict.fromkeys(("tp", "cp", "ep", "dp", "pp", "offload", "activations", "working", "logits"), "moved"),
    **dict.fromkeys(("bubble", "launch", "rest", "outside", "gathered"), "idle"),
}
"""Colour of each part."""


def draw_page(found: Search, plans: Sequence[Plan], title: str, answers: Iterable[Answer]) -> str:
    """The page of a search. `plans`: the best, as they are to be ranked."""
    pareto = Pareto(found)
    parts = [
        *(_facts(plans[0]) if plans else [tag("p", _sentence(refusal(found)), class_="verdict")]),
        *_pareto(pareto),
        *(_ranking(plans, found.cluster.unit) if plans else []),
        *(_rivals(found, plans[0]) if plans else []),
        *(_tight(found, plans[0]) if plans else []),
        *_nearest(found),
        *_parts(plans[:SHOWN]),
        *(_pipeline(plans[0]) if plans else []),
        *(_places(plans[0]) if plans else []),
        *_answers(answers),
    ]
    return _written(title, found.cluster, found.job, counted(found), parts, pareto)


def draw_plan(plan: Plan, title: str, answers: Iterable[Answer]) -> str:
    """The page of one layout, whether it fits or not."""
    told = f"one layout, which {plan.verdict}"
    parts = [*_facts(plan), *_parts([plan]), *_pipeline(plan), *_places(plan), *_answers(answers)]
    return _written(title, plan.cluster, plan.job, told, parts)


def _written(
    title: str, cluster: Cluster, job: Job, told: str, parts: Iterable[Element], pareto: Pareto | None = None
) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} on {cluster.gpus:,} × {cluster.title}"),
        tag("style", STYLE.read_text(encoding="utf-8")),
    )
    body = tag(
        "main",
        tag("h1", f"{title} on {cluster.gpus:,} × {cluster.title}"),
        tag("p", f"{told}; {asked(job)}", class_="told"),
        *parts,
        tag(
            "p",
            "Predicted by weft plan layouts; docs/accuracy.md has how near that is to what others measured.",
            class_="told",
        ),
    )
    points = [[round(it.x), round(it.y), it.words] for it in pareto.points()] if pareto is not None else []
    data = json.dumps(points, separators=(",", ":")).replace("<", "\\u003c")
    script = SCRIPT.read_text(encoding="utf-8")
    tip = tag("div", id="tip", role="status")
    return page(
        tag("html", head, tag("body", body, tip, tag("script", f"const points = {data};\n{script}")), lang="en")
    )


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _facts(plan: Plan) -> list[Element]:
    facts = {
        "a step": (duration(plan.seconds), f" ± {100 * plan.time.spread:.0f} %"),
        "tokens/s": (short(plan.tokens_per_s), ""),
        "MFU, causal": (percent(plan.mfu(causal=True)), ""),
        "days": (f"{plan.days:,.1f}", ""),
        f"{plan.cluster.unit}-hours": (short(plan.gpu_hours), ""),
        "memory": (gibibytes(plan.bytes), f" ± {100 * plan.memory.spread:.0f} %"),
        "left": (gibibytes(plan.headroom), ""),
        "bound by": (plan.bound, ""),
    }
    cards = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", spread))) for name, (value, spread) in facts.items()
    ]
    return [tag("p", tag("code", str(plan.layout)), class_="verdict"), tag("dl", *cards, class_="facts")]


def _pareto(pareto: Pareto) -> list[Element]:
    if not len(pareto.rows):  # everything is so far from fitting that nothing was timed
        return []
    rows: list[list[Child]] = [
        [tag("code", str(point.layout)), duration(point.seconds), gibibytes(point.bytes)] for point in pareto.frontier()
    ]
    words = (
        "Every layout at most four times as slow as the best. Blue fits, pale blue fits tightly, grey does not. No "
        "layout is both faster and smaller than one on the line."
    )
    listed = tag("details", tag("summary", f"the {len(rows)} on the line"), table(("layout", "a step", "memory"), rows))
    return section("Memory against time", words, tag("div", pareto.draw(), class_="wide"), listed)


def _ranking(plans: Sequence[Plan], unit: str) -> list[Element]:
    hours = f"{unit}-hours"
    names = ("layout", "step", "tokens/s", "MFU causal", "full", "days", hours, "memory", "left", "bound by")
    rows: list[list[Child]] = [
        [
            tag("code", str(plan.layout)), duration(plan.seconds), short(plan.tokens_per_s),
            percent(plan.mfu(causal=True)), percent(plan.mfu(causal=False)), f"{plan.days:,.1f}",
            short(plan.gpu_hours), gibibytes(plan.bytes), left(plan), plan.bound,
        ]
        for plan in plans
    ]  # fmt: skip
    return section("The best", "Those that fit and that weft runs, fastest first; tight ones last.", table(names, rows))


def _rivals(found: Search, winner: Plan) -> list[Element]:
    rows: list[list[Child]] = [
        [word, slower(plan, winner), why_slower(plan, winner), tag("code", str(plan.layout))]
        for word, plan in found.rivals()
    ]
    words = "The best layout with another value of one axis, and the part of the step that differs most."
    return section("Why not", words, table(("with", "slower", "mostly", "layout"), rows)) if rows else []


def _tight(found: Search, winner: Plan) -> list[Element]:
    if (plan := found.tight(winner)) is None:
        return []
    line = f": {duration(plan.seconds)} a step, {slower(plan, winner)}, and {memory_of(plan)}."
    words = "It fits if it takes what is predicted, and not if it takes as much more as predictions are off."
    return section("Faster, but tight", words, tag("p", tag("code", str(plan.layout)), line))


def _nearest(found: Search) -> list[Element]:
    told = found.nearest()
    if told is None:
        return []
    short_of, change, words = told
    line: list[Child] = [
        tag("code", str(short_of.layout)),
        f" would take {duration(short_of.seconds)}, and {gibibytes(short_of.bytes)} of {gibibytes(found.cluster.memory)}.",
    ]
    if change is not None:
        line += [
            f" With {', '.join(words)} it fits: ",
            tag("code", str(change.layout)),
            f", {duration(change.seconds)}{tightly(change)}.",
        ]
    if not len(found.order):
        return section("Smallest that does not fit", "What comes nearest.", tag("p", *line))
    return section("Fastest that does not fit", "What more memory would buy.", tag("p", *line))


def _parts(plans: Sequence[Plan]) -> list[Element]:
    drawn = []
    for place, plan in enumerate(plans):
        inside = tag("code", str(plan.layout))
        time = tag(
            "div",
            tag("h3", f"time of a step: {duration(plan.seconds)}"),
            *_bars(time_parts(plan), plan.seconds, duration),
        )
        size = max(plan.bytes, plan.cluster.memory)
        memory = tag(
            "div",
            tag("h3", f"memory: {gibibytes(plan.bytes)} of {gibibytes(plan.cluster.memory)}"),
            *_bars(memory_parts(plan), size, gibibytes),
        )
        attributes = {"open": "open"} if place == 0 else {}
        drawn.append(tag("details", tag("summary", inside), tag("div", time, memory, class_="pair"), **attributes))
    of = f"The best {len(drawn)}, each" if len(drawn) > 1 else "Each"
    if not plans:
        return []
    words = (
        f"{of} part on top of those before. Memory is drawn against what a {plans[0].cluster.unit} has, where it fits."
    )
    return section("Part by part", words, *drawn)


def _bars(parts: Sequence[Part], whole: float, unit) -> Iterator[Element]:  # type: ignore[no-untyped-def]
    for part in parts:
        place = f"margin-left:{100 * part.start / whole:.2f}%;width:{max(0.4, 100 * part.size / whole):.2f}%"
        yield tag(
            "div",
            tag("span", part.name),
            tag("span", tag("i", style=place, class_=FAMILY[part.name]), class_="track"),
            tag("span", unit(part.size)),
            class_="bar",
            title=f"{part.what}: {percent(part.size / whole)}",
        )


def _pipeline(plan: Plan) -> list[Element]:
    layout, count = plan.layout, plan.layout.num_micro_batches(plan.job.global_batch)
    if layout.pp == 1:
        return []
    drawn = min(count, 2 * layout.pp)
    sizes = {"global_batch": plan.job.global_batch, "seq": plan.job.seq}
    config = make_config({"model": plan.shape, "layout": layout, "train": sizes})
    report = ScheduleReport(layout.table(drawn), modelled_costs(config), config)
    svg = draw_svg(report.schedule, report.line, headline(report), summary(report))
    picture = ElementTree.fromstring(svg.replace(" xmlns='http://www.w3.org/2000/svg'", ""))
    more = (
        f" Drawn with {drawn} micro-batches; a step has {count}, and waits for a smaller share."
        if drawn < count
        else ""
    )
    words = f"The {layout.pp} stages of {layout} in time.{more}"
    return section("Pipeline", words, tag("div", picture, class_="wide schedule"))


def _places(plan: Plan) -> list[Element]:
    unit, units = plan.cluster.unit, plan.cluster.units
    words = f"One square is a {unit}, one box a node. {units[0].upper()}{units[1:]} of one colour have the same part."
    if plan.layout.world == 1:
        return []
    return section("On the cluster", words, tag("div", *draw_places(plan.layout, plan.cluster), class_="pair"))


def _answers(answers: Iterable[Answer]) -> list[Element]:
    rows: list[list[Child]] = [
        [it.question, it.answer, tag("code", str(it.layout)) if it.layout else ""] for it in answers
    ]
    return (
        section("What if", "The best layout for each.", table(("question", "answer", "layout"), rows)) if rows else []
    )
