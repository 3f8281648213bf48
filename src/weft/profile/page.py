"""A profile as one HTML page that needs nothing else. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weft.plan.show.markup import Child, Element, page, section, table, tag
from weft.plan.show.page import STYLE
from weft.plan.show.report import large
from weft.profile.advice import advise
from weft.profile.load import Profile
from weft.profile.memory import memory_of
from weft.profile.merge import clock_words
from weft.profile.names import EXPOSED, WORK
from weft.profile.pictures import colour, draw_memory, draw_roofline, draw_steps, legend
from weft.profile.report import headline, milliseconds, sent, slowest_rank, speed
from weft.profile.roofline import device_of, operations
from weft.profile.summary import KIND_WORDS, by_part, ordered, stragglers
from weft.units import gibibytes, percent, short

OWN_STYLE = Path(__file__).parent / "page_assets" / "profile.css"


def draw_page(profile: Profile) -> str:
    title = f"{profile.about.get('layout', profile.folder.name)}: where a step's time and memory go"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", STYLE.read_text(encoding="utf-8") + OWN_STYLE.read_text(encoding="utf-8")),
    )
    body = tag(
        "main",
        tag("h1", title),
        tag("p", headline(profile).partition("\n")[0], class_="told"),
        tag("dl", *_facts(profile), class_="facts"),
        *_advice(profile),
        *_time(profile),
        *_kinds(profile),
        *_parts(profile),
        *_messages(profile),
        *_operations(profile),
        *_memory(profile),
        *_ranks(profile),
        tag("p", "Measured by weft train --profile; docs/profile.md says how each number is made.", class_="told"),
    )
    return page(tag("html", head, tag("body", body), lang="en"))


def _facts(profile: Profile) -> Iterator[Element]:
    total = sum(profile.kinds.values())
    exposed = sum(seconds for kind, seconds in profile.kinds.items() if kind.endswith(EXPOSED))
    facts = {"a step": milliseconds(profile.seconds)}
    config = profile.config
    if config is not None:
        facts["tokens/s"] = short(config.train.global_batch * config.seq / profile.seconds)
        for name, causal in (("MFU", False), ("MFU, causal", True)):
            mfu = profile.mfu(causal=causal)
            if mfu is not None:
                facts[name] = percent(mfu)
    facts["works"] = percent(sum(profile.kinds[kind] for kind in WORK) / total)
    facts["exposed messages"] = percent(exposed / total)
    facts["bubble"] = percent(profile.kinds["bubble"] / total)
    facts["host"] = percent(profile.kinds["host"] / total)
    for name, value in facts.items():
        yield tag("div", tag("dt", name), tag("dd", value))


def _advice(profile: Profile) -> list[Element]:
    rows = [tag("li", tag("b", it.change), f": {it.gain}", tag("small", it.evidence)) for it in advise(profile)]
    words = "Largest gain first. Of time it is what was measured, at most; of memory, what the planner's model says."
    return section("What to change", words, tag("ol", *rows, class_="advice")) if rows else []


def _time(profile: Profile) -> list[Element]:
    words = f"The last traced step of every rank; {clock_words(profile)}. A column's colour is what took most of it."
    drawn = tag("div", draw_steps(profile), class_="wide")
    return section("A step in time", words, drawn, legend(kind for kind, _ in ordered(profile.kinds)))


def _kinds(profile: Profile) -> list[Element]:
    total = sum(profile.kinds.values())
    bars = []
    for kind, seconds in ordered(profile.kinds):
        style = f"width:{max(0.3, 100 * seconds / total):.2f}%;background:{colour(kind)}"
        bars.append(
            tag(
                "div",
                tag("span", kind),
                tag("span", tag("i", style=style), class_="track"),
                tag("span", f"{milliseconds(seconds)} · {percent(seconds / total)}"),
                class_="bar",
                title=KIND_WORDS.get(kind, "messages that nothing hides"),
            )
        )
    return section(
        "Where the time goes", "Mean of the ranks; all of it adds up to a step.", tag("div", *bars, class_="bars")
    )


def _parts(profile: Profile) -> list[Element]:
    layers = by_part(profile)
    if not layers:
        return []
    longest, total = max(layer.seconds for layer in layers), sum(layer.seconds for layer in layers)
    rows: list[list[Child]] = []
    for layer in layers:
        other = max(0.0, layer.seconds - layer.forward - layer.backward - layer.again)
        spans = (
            (layer.forward, "#2f6db5", "forward"), (layer.backward, "#c4553b", "backward"),
            (layer.again, "#b98a1d", "again"), (other, "#8b93a3", "other"),
        )  # fmt: skip
        stack = tag(
            "div",
            *(
                tag(
                    "i", style=f"width:{100 * it / longest:.2f}%;background:{fill}", title=f"{word}: {milliseconds(it)}"
                )
                for it, fill, word in spans
                if it
            ),
            class_="stack",
        )
        cells = (layer.attention, layer.mlp, layer.norms, layer.messages, layer.seconds)
        rows.append(
            [layer.name, stack, *(milliseconds(it) if it else "–" for it in cells), percent(layer.seconds / total)]
        )
    names = ("part", "forward, backward, again", "attention", "mlp", "norms", "messages", "all", "")
    return section("Part by part", "Of the model, mean of the ranks.", table(names, rows))


def _messages(profile: Profile) -> list[Element]:
    rows: list[list[Child]] = [
        [
            str(rank.number), it.axis, it.kind, f"{it.count:g}", sent(it), milliseconds(it.seconds),
            milliseconds(it.exposed), percent(it.overlapped / max(it.seconds, 1e-12)),
            speed(it),
        ]
        for rank in profile.ranks
        for it in rank.traffic
    ]  # fmt: skip
    names = ("rank", "axis", "message", "count", "sent", "under way", "exposed", "hidden", "rate")
    return (
        section("Messages", "Of a step. Exposed: the process stood still for them.", table(names, rows)) if rows else []
    )


def _operations(profile: Profile) -> list[Element]:
    rank = slowest_rank(profile)
    found, device = operations(rank.breakdown, 20), device_of(profile)
    if not found:
        return []
    rows: list[list[Child]] = [
        [
            it.name, it.dims, f"{it.count:g}", milliseconds(it.seconds), f"{large(it.rate())}FLOP/s" if it.flops else "",
            it.bound(device) if device and it.bytes else "", percent(it.reached(device)) if device and it.bytes else "",
        ]
        for it in found
    ]  # fmt: skip
    names = ("operation", "tensors", "count", "time", "rate", "bound by", "of the roof")
    words = f"On rank {rank.number}."
    if device is not None:
        words += (
            f" The roof is {device.name}'s: {large(device.flops)}FLOP/s, {large(device.bytes)}B/s ({device.source})."
        )
    picture = draw_roofline(found, device) if device is not None else None
    drawn = tag("div", picture, class_="wide") if picture is not None else None
    return section("Largest operations", words, drawn, table(names, rows))


def _memory(profile: Profile) -> list[Element]:
    found = [(memory_of(rank.breakdown.attribution, rank.facts), rank) for rank in profile.ranks]
    known = [(memory, rank) for memory, rank in found if memory is not None]
    if not known:
        return []
    memory, rank = max(known, key=lambda pair: pair[0].peak)
    rows: list[list[Child]] = [
        [what, gibibytes(size), percent(size / memory.peak)] for what, size in memory.holders.most_common() if size
    ]
    parts: list[list[Child]] = [[part, gibibytes(size)] for part, size in memory.parts.most_common(12)]
    words = f"Tensors of rank {rank.number}, which holds most: {gibibytes(memory.peak)}, in the {memory.moment}."
    tables = tag(
        "div",
        table(("held at the peak", "bytes", ""), rows),
        table(("activations of", "bytes"), parts) if parts else None,
        class_="pair",
    )
    drawn = tag("div", draw_memory(memory, rank.breakdown.steps), class_="wide")
    return section("Memory over time", words, drawn, tables)


def _ranks(profile: Profile) -> list[Element]:
    if len(profile.ranks) == 1:
        return []
    slow, rows = stragglers(profile), []
    longest = max(rank.seconds for rank in profile.ranks)
    for rank in profile.ranks:
        spans = [
            tag(
                "i",
                style=f"width:{100 * seconds / longest:.2f}%;background:{colour(kind)}",
                title=f"{kind}: {milliseconds(seconds)}",
            )
            for kind, seconds in ordered(rank.kinds)
        ]
        row: list[Child] = [
            str(rank.number), milliseconds(rank.seconds), tag("div", *spans, class_="stack"),
            tag("span", slow.get(rank.number, ""), class_="late"),
        ]  # fmt: skip
        rows.append(row)
    return section("Ranks side by side", "Colours as above.", table(("rank", "a step", "where it goes", ""), rows))
