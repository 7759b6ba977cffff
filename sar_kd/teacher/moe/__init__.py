"""The routers of a mixture-of-experts teacher: finding them, directing them, training them from the student (SAR).

`discovery` finds them, `routing_hooks` directs them while a context is open, `router_training` is the student-aware
router, `router_metrics` watches entropy and usage, `router_checkpoint` writes what was learned.
"""
