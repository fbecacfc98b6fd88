"""``kedit show``: print what a delta changed, tensor by tensor."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import json_option, new_path, print_json, print_table, size, write_text
from kedit_train.plural import plural

# The rank of a sparse change is computed only if the change has at most this many rows, or at most this many columns.
MAX_SIDE = 2048
COLUMNS = [("tensor", False), ("stored as", False), ("shape", True), ("dtype", True), ("moved", True)]
COLUMNS += [("|change|", True), ("of base", True), ("largest", True), ("rank", True), ("stable rank", True)]
HELP = "show what a delta changed: tensors, norms, ranks and scores, and a picture on request"
EPILOG = """\
examples:
  kedit show runs/mine/edit.safetensors
  kedit show runs/mine/edit.safetensors --png                  writes runs/mine/edit.png
  kedit show runs/mine/edit.safetensors --html                 writes runs/mine/edit.html
  kedit show runs/mine/edit.safetensors --json --no-ranks      faster for large matrices

columns:
  stored as     what the file contains: the full tensor (dense), rows, columns or single entries
  moved         fraction of entries that changed
  |change|      Frobenius norm of edited - base
  of base       |change| divided by the norm of the base tensor, if the delta contains the full tensor
  largest       largest absolute change of an entry
  rank          number of singular values of the change that are larger than the rounding error
  stable rank   |change| squared, divided by the square of the largest singular value of the change
                For a tensor stored as single entries, only the rows and columns with changed entries count. The
                ranks are not computed if more than 2,048 rows and more than 2,048 columns count. They are also not
                computed if the number of these rows times the number of these columns is more than 67 million.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "delta", metavar="DELTA", help="a delta: the weight change of an edit, saved by SaveDelta or kedit merge"
    )
    parser.add_argument(
        "--png",
        nargs="?",
        const="",
        metavar="FILE",
        help="write a heat map to this file; without a file name, write the heat map next to the delta",
    )
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help="write an HTML page to this file; without a file name, write the page next to the delta",
    )
    parser.add_argument("--no-ranks", action="store_true", help="do not compute ranks, to save time")
    parser.add_argument("--force", action="store_true", help="replace an existing picture or page")
    json_option(parser)


def run(args: Namespace) -> int:
    picture = None
    if args.png is not None:
        picture = new_path(args.png or str(Path(args.delta).with_suffix(".png")), force=args.force)
    page = None
    if args.html is not None:
        page = new_path(args.html or str(Path(args.delta).with_suffix(".html")), force=args.force)
    from tqdm import tqdm

    from kedit_train.cli.console import plain
    from kedit_train.delta import EditDelta

    delta = EditDelta.load(args.delta)
    bar = tqdm(delta.changes.items(), desc="reading", unit="tensor", leave=False, disable=None)
    rows = [describe(name, change, ranks=not args.no_ranks) for name, change in bar]
    if picture is not None:
        from kedit_train.cli.kedit.heat_map import heat_map

        heat_map(delta, picture)
    if page is not None:
        write_text(page, _page(delta, rows) + "\n")
    written = {name: str(path) for name, path in (("png", picture), ("html", page)) if path is not None}
    if args.json:
        print_json({"file": args.delta, "bytes": delta.nbytes, **delta.meta, "tensors": rows, **written})
        return 0
    for name, value in _facts(delta.meta):
        print(plain(f"{name:<9} {value}"))
    print()
    print_table(COLUMNS, [_cells(row) for row in rows], f"{plural(len(rows), 'tensor')}, {size(delta.nbytes)}")
    too_large = [
        row
        for row in rows
        if row["layout"] == "entries" and len(row["shape"]) == 2 and row["norm"] and row["rank"] is None
    ]
    if too_large and not args.no_ranks:
        count = plural(len(too_large), "tensor")
        print(f"rank: not computed for {count}: too many rows and columns with changed entries (see kedit show --help)")
    if written:
        print()
    for name, path in written.items():
        print(f"{'picture' if name == 'png' else 'page'}: {path}")
    return 0


def _page(delta: Any, rows: list[dict[str, Any]]) -> str:
    """Return an HTML page with the metadata of the delta, the change per layer, and the table of its tensors."""
    from kedit_train.evaluation.reporting.html_elements import Cell, page, paragraph, table
    from kedit_train.evaluation.reporting.html_report import drift_section

    head = [Cell(text=name, style="number" if numbers else "") for name, numbers in COLUMNS]
    cells = ([Cell(text=text) for text in _cells(row)] for row in rows)
    parts = [
        "<h1>What did the edit change?</h1>",
        paragraph(f"{plural(len(rows), 'tensor')}, {size(delta.nbytes)}", "dim"),
    ]
    parts += [*drift_section(delta.norms()), "<h2>Tensors</h2>", table(head, cells), "<h2>About the delta</h2>"]
    facts = ([Cell(text=name, style="dim"), Cell(text=value, style="text")] for name, value in _facts(delta.meta))
    parts.append(table([Cell(), Cell()], facts))
    return page("What did the edit change?", "\n".join(parts))


def describe(name: str, change: Any, *, ranks: bool = True) -> dict[str, Any]:
    """Return norms, ranks and other measures of the change of one tensor.

    A measure that cannot be computed is None. For an integer tensor, all norms and ranks are None.
    """
    import torch

    row: dict[str, Any] = {"name": name, "layout": change.layout, "shape": list(change.shape)}
    row |= {"dtype": str(change.dtype).removeprefix("torch."), "tied": list(change.tied), "bytes": change.nbytes}
    moved_entries = int((change.before != change.after).sum())
    entries = max(1, torch.Size(change.shape).numel())
    row |= {"moved": moved_entries, "share_moved": moved_entries / entries}
    row |= dict.fromkeys(("norm", "relative", "largest", "rank", "stable_rank"))
    if not change.dtype.is_floating_point:
        return row
    # Entries that did not change add nothing to a norm or a rank, so the stored entries are enough.
    moved = change.after.double() - change.before.double()
    norms = change.norms()
    row |= {"norm": norms["change"], "largest": float(moved.abs().max()) if moved.numel() else 0.0}
    row["relative"] = norms["change"] / norms["before"] if norms["before"] else None
    if ranks and len(change.shape) == 2 and bool(moved.isfinite().all()):
        whole = moved if change.layout != "entries" else _without_zeros(change, moved)
        if whole is not None:
            values = torch.linalg.svdvals(whole.float())
            rounding = max(change.shape) * torch.finfo(torch.float32).eps * float(values[0])
            row["rank"] = int((values > rounding).sum())
            row["stable_rank"] = float(values.square().sum() / values[0].square()) if float(values[0]) else None
    return {key: None if isinstance(value, float) and value - value != 0 else value for key, value in row.items()}


def _without_zeros(change: Any, moved: Any) -> Any:
    """Remove the unchanged rows and columns from the matrix of a sparse change, and return the smaller matrix.

    Both matrices have the same rank and norms. The result is None if the smaller matrix is still too large to compute
    its rank in seconds.
    """
    import torch

    numbers = change.index.long()
    rows, row = (numbers // change.shape[1]).unique(return_inverse=True)
    columns, column = (numbers % change.shape[1]).unique(return_inverse=True)
    if min(len(rows), len(columns)) > MAX_SIDE or len(rows) * len(columns) > MAX_SIDE**2 * 16:
        return None
    matrix = torch.zeros(len(rows), len(columns), dtype=moved.dtype)
    matrix[row, column] = moved
    return matrix


def _cells(row: Mapping[str, Any]) -> list[str]:
    def figure(value: float | None, pattern: str = ".3g") -> str:
        return "–" if value is None else format(value, pattern)

    tied = f" (= {', '.join(row['tied'])})" if row["tied"] else ""
    cells = [row["name"] + tied, row["layout"], "x".join(map(str, row["shape"])), row["dtype"]]
    cells += [f"{row['share_moved']:.2%}", figure(row["norm"]), figure(row["relative"], ".2%"), figure(row["largest"])]
    return [*cells, figure(row["rank"], "d"), figure(row["stable_rank"], ".1f")]


def _facts(meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    base, edits = meta["base"], meta.get("edits") or {}
    license = f", license {base['license']}" if base.get("license") else ""
    yield "base", f"{base.get('name') or 'unnamed'} ({base['fingerprint'][:12]}{license})"
    parents = f", {len(edits['parents'])} deltas merged" if edits.get("parents") else ""
    hashed = f" (SHA-256 {edits['hash'][:12]})" if edits.get("hash") else ""
    yield "edits", f"{edits.get('count', 0) or 'not recorded'}{hashed}{parents}"
    configuration = meta.get("configuration")
    if isinstance(configuration, Mapping):
        for key, value in configuration.items():
            for line in value if isinstance(value, list) else [value]:
                yield str(key), str(line)
    for name, value in sorted((meta.get("scores") or {}).items()):
        yield "score", f"{name} {value:.3f}"
    yield "versions", f"{', '.join(f'{name} {value}' for name, value in (meta.get('versions') or {}).items())}"
