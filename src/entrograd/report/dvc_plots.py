"""The page template of `dvc plots show`, the drawing library within: it needs no network.

`python -m entrograd.report.dvc_plots` writes .dvc/plots.html, which .dvc/config names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from entrograd.errors import extra
from entrograd.storage.files import write_text

PLACE = Path(".dvc/plots.html")

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>entrograd: plots</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem }}</style>
<script>{library}</script>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def page() -> str:
    """The template: `{plot_divs}` is where DVC puts its plots."""
    with extra("report"):
        import vl_convert
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return PAGE.format(library=library.replace("</script", "<\\/script"))


if __name__ == "__main__":
    write_text(PLACE, page())
    sys.exit(0)
