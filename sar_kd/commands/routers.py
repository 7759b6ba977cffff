"""`python -m sar_kd routers`: lists the routers of a mixture-of-experts model."""

from __future__ import annotations

import json

from sar_kd.config.commands import RoutersConfig
from sar_kd.models.loading import load_meta_model
from sar_kd.teacher.moe.discovery import describe_routers, find_routers


def main(config: RoutersConfig) -> dict:
    """Print a line for each router of `--model`; `--json` for programs. No weights are read.

    Raises: UsageError for what the user can mend
    """
    model = load_meta_model("model", config.model, config.trust_remote_code)
    records = describe_routers(find_routers(model, config.router_patterns))
    print(json.dumps(records, indent=2) if config.json else "\n".join(router_lines(records)))
    return {"status": "finished"}


def router_lines(records: list[dict]) -> list[str]:
    """A table of the records of `describe_routers`."""
    if not records:
        return ["Dense: no routers"]
    header = ("router", "class", "weights", "experts", "score", "weights sum to", "routing", "trainable", "found by")
    rows = [header, *(_cells(record) for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(record["trainable"] for record in records)
    num_without = sum(not record["native_gradient"] for record in records)
    lines.append(f"{len(records)} routers, {total:,} parameters that --routing sar trains")
    if num_without:
        lines.append(f"{num_without} of them have no gradient in the native routing (one expert, weight always 1)")
    return lines


def _cells(record: dict) -> tuple[str, ...]:
    return (
        record["name"],
        record["class"],
        ", ".join("x".join(map(str, shape)) for shape in record["shapes"].values()),
        f"{record['top_k']} of {record['num_experts']}",
        record["score"],
        f"{record['scale']:g}" if record["normalised"] else f"not normalised, times {record['scale']:g}",
        record["routing"],
        f"{record['trainable']:,}",
        record["found_by"],
    )
