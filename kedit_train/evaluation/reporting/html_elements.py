"""The parts of an HTML report: the frame of the page, its style, tables and key figures.

A page is one file without scripts and without links to other files. The functions of this module escape plain text.
They do not escape arguments that are described as HTML. Colors are semi-transparent or inherited, so that the text is
readable on light and dark backgrounds, also in a notebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
.kedit { font: 14px/1.45 system-ui, sans-serif; max-width: 68rem; --accent: #2f81c7; --yes: #2f9e57; --no: #d9483b;
  --line: color-mix(in srgb, currentColor 20%, transparent); --dim: color-mix(in srgb, currentColor 68%, transparent); }
.kedit h1 { font-size: 1.6rem; margin: 0 0 .25rem; } .kedit h1:not(:first-of-type) { margin-top: 2.5rem; }
.kedit h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.kedit p { margin: .4rem 0; } .kedit .dim, .kedit figcaption { color: var(--dim); font-size: .9em; }
.kedit .warning { border-left: 3px solid #d08700; padding-left: .6rem; }
.kedit .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; max-width: 52rem; }
.kedit .figures > div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; }
.kedit .figures b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.kedit .wide { overflow-x: auto; }
.kedit table { border-collapse: collapse; margin: 0; color: inherit; background: none; font-size: 1em; }
.kedit th, .kedit td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; background: none;
  border: 0; border-bottom: 1px solid var(--line); overflow-wrap: break-word; white-space: normal; max-width: none; }
.kedit td.text, .kedit bdi { overflow-wrap: anywhere; }
.kedit th { color: var(--dim); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
.kedit .number { padding-left: .6rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.kedit th.number { white-space: normal; }
.kedit td.label { overflow-wrap: normal; min-width: 9rem; }
.kedit tr.part td { color: var(--dim); } .kedit tr.part td.label { padding-left: 1.2rem; }
.kedit tr.strong td { font-weight: 600; }
.kedit .yes { color: var(--yes); } .kedit .no { color: var(--no); }
.kedit del, .kedit ins { border-radius: 3px; padding: 0 .1em; color: inherit; }
.kedit del { background: rgb(217 72 59 / .22); text-decoration: line-through; }
.kedit ins { background: rgb(47 158 87 / .26); text-decoration: none; border-bottom: 2px solid var(--yes); }
.kedit bdi { white-space: pre-wrap; }
.kedit figure { margin: .5rem 0; max-width: 36rem; } .kedit svg { display: block; width: 100%; height: auto; }
.kedit svg text { fill: currentColor; font: 10px system-ui, sans-serif; }
.kedit svg.interval { width: 7.5rem; margin-left: auto; }
.kedit .legend span { margin-right: 1.2em; white-space: nowrap; }
.kedit .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em; }
@media (max-width: 640px) {
  .kedit table.cards thead { display: none; } .kedit table.cards, .kedit table.cards tbody { display: block; }
  .kedit table.cards tr { display: block; position: relative; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .kedit table.cards td { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); border: 0; padding: .1rem 0; }
  .kedit table.cards td::before { content: attr(data-label); color: var(--dim); }
  .kedit table.cards td:nth-child(2) { padding-right: 1.2rem; }
  .kedit table.cards td:not([data-label]) { position: absolute; top: .5rem; right: 0; max-width: 55%;
    display: block; }
  .kedit table.cards td.number { text-align: left; }
  .kedit table:not(.cards) { font-size: 11.5px; } .kedit table:not(.cards) :is(td, th) { padding-right: .25rem; }
  .kedit table:not(.cards) th { font-size: 10.5px; } .kedit svg.interval { width: 3.6rem; }
  .kedit td.label { min-width: 4.2rem; overflow-wrap: anywhere; }
  .kedit tr.part td.label { padding-left: .6rem; }
}
"""
# The Content-Security-Policy forbids scripts and every request, even if a text was not escaped by mistake.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }} .kedit {{ margin: 0 auto; }}
body {{ background: Canvas; color: CanvasText; margin: 0; padding: clamp(.6rem, 2vw, 1.4rem); }}
</style>
</head>
<body>
{body}
</body>
</html>"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table.

    Args:
        text: plain text.
        html: HTML that is shown after the text. It is inserted as it is, so the caller must escape all text in it.
        style: class of the cell: "number", "label", "text" (long words may be broken), "yes", "no", "dim" or empty.
    """

    text: str = ""
    html: str = ""
    style: str = ""


def fragment(body: str) -> str:
    """Return ``body`` (HTML) together with the style sheet, for a notebook."""
    return f'<div class="kedit"><style>{_STYLE}</style>\n{body}\n</div>'


def page(title: str, body: str) -> str:
    """Return a complete HTML page.

    Args:
        title: plain text.
        body: HTML.
    """
    return _PAGE.format(title=escape(title), body=fragment(body))


def paragraph(text: str, style: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def table(
    head: Sequence[Cell], rows: Iterator[Sequence[Cell]], *, styles: Sequence[str] = (), cards: bool = False
) -> str:
    """Return a table.

    Args:
        head: the cells of the first row. If a cell in ``rows`` has no style, it gets the style of the first cell
            in its column.
        rows: the cells of the other rows.
        styles: one class per item of ``rows``: "part", "strong" or an empty text. Default: no classes.
        cards: on narrow screens, show each row as a list of lines "column: cell".
    """
    lines = [
        f'<div class="wide"><table{" class=cards" if cards else ""}>',
        f"<thead><tr>{_row(head, head, 'th')}</tr></thead>",
    ]
    lines.append("<tbody>")
    for number, row in enumerate(rows):
        style = styles[number] if number < len(styles) else ""
        lines.append(f"<tr{f' class={style}' if style else ''}>{_row(head, row, 'td')}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _row(head: Sequence[Cell], cells: Sequence[Cell], tag: str) -> str:
    parts = []
    for column, cell in zip(head, cells, strict=True):
        style = cell.style or column.style
        attributes = f' class="{style}"' if style else ""
        attributes += f' data-label="{escape(column.text)}"' if tag == "td" and column.text else ""
        parts.append(f"<{tag}{attributes}>{escape(cell.text)}{cell.html}</{tag}>")
    return "".join(parts)


def figures(values: Sequence[tuple[str, str, str]]) -> str:
    """Return a row of key figures. Each item is a tuple of plain texts: name, figure, text below the figure."""
    boxes = (
        f'<div>{escape(name)}<b>{escape(figure)}</b><span class="dim">{escape(below)}</span></div>'
        for name, figure, below in values
    )
    return f'<div class="figures">{"".join(boxes)}</div>'


def figure(svg: str, caption: str) -> str:
    """Return a picture with its caption.

    Args:
        svg: the picture, an SVG element.
        caption: plain text.
    """
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
