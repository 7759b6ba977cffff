"""The routers of a mixture-of-experts teacher: finding them, replacing their routing, training them (SAR).

`discovery` finds them, `routing_hooks` replaces their routing while a context is open, `router_training` trains them
from the student, `router_metrics` measures entropy and usage, `router_checkpoint` writes the trained weights.
"""
