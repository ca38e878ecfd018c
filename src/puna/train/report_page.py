"""The page of a report: its style and its frame, with places for title and body. It loads nothing."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1f2933; --dim: #647282; --rule: #dfe4ea; --back: #fff;
  --line: #2a6f97; --other: #c8553d; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --dim: #93a1b0; --rule: #323c47; --back: #14191f;
    --line: #6fb1d6; --other: #ec8a70; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.state { color: var(--dim); margin: .25rem 0 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem .3rem 0;
  border-bottom: 1px solid var(--rule); }
th { width: 16rem; font-weight: normal; color: var(--dim); } th b { color: var(--text); font-weight: 600; }
td { overflow-wrap: anywhere; white-space: pre-wrap; } .samples th { width: 6rem; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; } figcaption { color: var(--dim); font-size: .9rem; }
details { margin-top: .75rem; } summary { cursor: pointer; color: var(--dim); }
</style>
</head>
<body>
$body
</body>
</html>
""")
