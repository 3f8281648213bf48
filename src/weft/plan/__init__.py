"""What a layout costs, worked out from its sizes: nothing is allocated, and torch is not imported.

`work.py` has the sizes as numbers, `memory` and `time` what follows; `plan.py` one layout of a model on a cluster,
`search.py` all of them; `show` the terminal's tables and the page; `emit` the settings of other systems.
"""
