"""What `weft prompt new` writes: a prompt of each kind, to be changed."""

from __future__ import annotations

PLAIN = """\
name = "{name}"
version = 1
about = "a text is continued"

# A field of a row stands in {{{{ }}}}: https://jinja.palletsprojects.com/templates
question = "Review: {{{{ text }}}}\\nIs it positive or negative? It is"
answer = " {{{{ label }}}}"          # how an example would be answered, with the space before

[sampling]
temperature = 0
max_tokens = 8
stop = ["\\n"]
"""

FEW_SHOT = """\
name = "{name}"
version = 1
about = "examples show what is wanted"

instruction = "Say of each review whether it is positive or negative."
question = "Review: {{{{ text }}}}\\nLabel:"
answer = " {{{{ label }}}}"
examples = [
    {{ text = "A waste of two hours.", label = "negative" }},
    {{ text = "I laughed all evening.", label = "positive" }},
]

[shots]
# file = "more.jsonl"    # further examples, a JSON object on each line
count = 2
select = "similar"       # first, random, similar (to the question), diverse

[sampling]
max_tokens = 8
stop = ["\\n"]

[output]
choices = ["positive", "negative"]
"""

REASONING = """\
name = "{name}"
version = 1
about = "the model thinks before it answers, several times; the most frequent answer counts"

instruction = "Think step by step. End with: The answer is N."
question = "Q: {{{{ text }}}}\\nA:"
answer = " {{{{ reasoning }}}} The answer is {{{{ label }}}}."
label = "{{{{ label }}}}"
examples = [
    {{ text = "I have 3 pens and buy 2 boxes of 4.", reasoning = "2 boxes of 4 are 8. 3 + 8 = 11.", label = "11" }},
]

[sampling]
temperature = 0.7
max_tokens = 256
stop = ["\\nQ:"]

[output]
pattern = 'The answer is (-?[\\d.,]*\\d)'
match = "number"
votes = 5                # self-consistency
"""

STRUCTURED = """\
name = "{name}"
version = 1
about = "the answer is JSON, of which one field counts"
chat = true

instruction = "Take the facts out of the user's text. Answer in JSON."
question = "{{{{ text }}}}"
answer = '{{"city": {{{{ label | tojson }}}}}}'

[sampling]
max_tokens = 64

[output]
field = "city"
match = "loose"

[output.json_schema]
type = "object"
required = ["city"]
additionalProperties = false

[output.json_schema.properties.city]
type = "string"
maxLength = 60
"""

STARTERS = {"plain": PLAIN, "few-shot": FEW_SHOT, "reasoning": REASONING, "structured": STRUCTURED}
