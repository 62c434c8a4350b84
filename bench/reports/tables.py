"""One table as Markdown, CSV or LaTeX, from the same cells of text."""

import csv
import io
import re

TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
}  # fmt: skip


def markdown(head: list[str], rows: list[list[str]], left: int = 2) -> str:
    """Return a Markdown table, padded to be read as it is. left: columns that are not numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.ljust(w) for text, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def csv_text(head: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def tex(text: str) -> str:
    """Return plain text as LaTeX that prints it."""
    return "".join(TEX.get(c, c) for c in text)


def latex(
    head: list[str], rows: list[list[str]], caption: str, notes: str = "", left: int = 2
) -> str:
    r"""Return a LaTeX table in booktabs' style, the notes below it, deviations as subscripts; the
    document needs \usepackage{booktabs,graphicx}. In two columns it spans both, and where it is
    wider than the text it is scaled down."""
    lines = [" & ".join(map(tex, line)) + r" \\" for line in (head, *rows)]
    lines = [re.sub(r" \$\\pm\$ ([^ ]+)", r"$_{\\pm \1}$", line) for line in lines]
    below = rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {tex(notes)}}}"
    return "\n".join([
        r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{tex(caption)}}}\smallskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}", r"\toprule",
        lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}}",
        *[below] * bool(notes), r"\end{table*}",
    ])  # fmt: skip
