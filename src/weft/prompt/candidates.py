"""Variants of a prompt: other instructions, other examples."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from weft.prompt.file import Prompt, PromptSampling, Row, Shots
from weft.prompt.model import Ask, Model
from weft.prompt.output import label_of
from weft.prompt.render import render

SHOWN = 5
"""Solved cases that a model sees when it is asked for instructions."""


def propose(prompt: Prompt, pool: Sequence[Row], model: Model, count: int, seed: int) -> list[str]:
    """Instructions that the model itself writes, out of the present one and solved cases (as APE, Zhou et al., 2022);
    fewer where it repeats itself."""
    cases = "\n".join(
        f"Input: {render(prompt, 'question', row)}\nOutput: {label_of(prompt, row)}\n" for row in pool[:SHOWN]
    )
    present = f"This instruction has been used: {prompt.instruction}\n" if prompt.instruction else ""
    text = f"Here are some inputs and the right outputs.\n\n{cases}\n{present}"
    if prompt.chat:
        text += "Write a better instruction for this task, in one or two sentences. Answer with the instruction alone."
    else:
        text += "A better instruction for this task, in one sentence, is:"
    sampling = PromptSampling(temperature=1.0, max_tokens=100, seed=seed, stop=() if prompt.chat else ("\n",))
    asked = Ask(({"role": "user", "content": text},) if prompt.chat else text, sampling, count)
    [(_, reply)] = model.complete([asked])
    written = (" ".join(re.sub(r"\{[{%#]|[}%#]\}", "", one).split()) for one in reply.texts)
    return [one for one in dict.fromkeys(written) if one and one != prompt.instruction]


def variants(
    prompt: Prompt, instructions: Sequence[str], pool: Sequence[Row], shots: Sequence[int], count: int, seed: int
) -> list[Prompt]:  # fmt: skip
    """The prompt itself, then each instruction with the prompt's own examples, then all of them with examples drawn from
    the pool, in any order; `count` at most, all different.

    Raises:
        ValueError: the pool has fewer rows than a variant needs.
    """
    if shots and max(shots) > len(pool):
        raise ValueError(f"--shots {max(shots)}: only {len(pool)} rows are set aside for examples")
    texts = list(dict.fromkeys([prompt.instruction, *instructions]))
    made = [variant(prompt, instruction=text) for text in texts][:count]
    numbers = np.random.default_rng(seed)
    known = {one.digest for one in made}
    for turn in range(20 * count if shots else 0):  # the same one may be drawn again
        if len(made) == count:
            break
        drawn = numbers.permutation(len(pool))[: shots[turn % len(shots)]]
        text = texts[int(numbers.integers(len(texts)))]
        one = variant(prompt, instruction=text, examples=tuple(pool[index] for index in drawn), shots=Shots())
        if one.digest not in known:
            known.add(one.digest)
            made.append(one)
    return made


def variant(prompt: Prompt, **changes: object) -> Prompt:
    """The next version of a prompt; the prompt itself where nothing is another."""
    changed = prompt.model_copy(update=changes)
    if changed.digest == prompt.digest:
        return prompt
    return changed.model_copy(update={"version": prompt.version + 1, "parent": prompt.id})
