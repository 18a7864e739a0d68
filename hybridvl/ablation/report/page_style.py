"""How the HTML page looks and what a click in it does."""

STYLE = """
:root { color-scheme: light dark; --ink: #22252b; --faint: #6b7280; --line: #e5e7eb; --paper: #f6f7f9; --card: #ffffff;
  --head: #eef1f4; --rule: #f0f1f3; --hover: #f3f7fb; --accent: #2f6690; --plain: #e8eaee;
  --good: #1d6b4b; --good-back: #dcefe6; --bad: #9b2f17; --bad-back: #f8dfd9; --hurt: #8a5a0b; --hurt-back: #fbe9d0;
  --open: #55397f; --open-back: #ece7f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --faint: #9aa1ab; --line: #343a43; --paper: #15181c; --card: #1d2126; --head: #272c33;
    --rule: #2a2f36; --hover: #232a33; --accent: #7fb3da; --plain: #343a43;
    --good: #8fd9b6; --good-back: #1c3d30; --bad: #f0a592; --bad-back: #4a2219; --hurt: #efc27a; --hurt-back: #46320f;
    --open: #c8b2ea; --open-back: #362a4c }
}
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
header, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  max-width: 1320px; margin: 18px auto; padding: 18px 26px }
h1 { font-size: 25px; margin: 0 0 6px } h2 { font-size: 19px; margin: 0 0 12px }
header p, section p { margin: 6px 0 10px; max-width: 100ch }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 10px; font-size: 14px }
nav a { color: var(--accent); text-decoration: none } nav a:hover { text-decoration: underline }
figure { margin: 20px 0 4px; overflow-x: auto; text-align: center }
img { max-width: 100%; height: auto; background: white; border-radius: 8px }
.scroll { display: inline-block; max-width: 100%; overflow: auto; max-height: 640px;
  border: 1px solid var(--line); border-radius: 8px }
.claims .scroll { max-height: none }
table { border-collapse: separate; border-spacing: 0; font-size: 13px;
  font-variant-numeric: tabular-nums }
.table + .table { margin-top: 14px }
th { position: sticky; top: 0; background: var(--head); text-align: left; padding: 7px 11px;
  white-space: nowrap; border-bottom: 1px solid var(--line); user-select: none }
.sorted th { cursor: pointer }
th:first-child, td:first-child { position: sticky; left: 0; background: inherit } th:first-child { z-index: 2 }
thead tr { background: var(--head) } tbody tr { background: var(--card) } tbody tr:hover { background: var(--hover) }
td { padding: 5px 11px; border-bottom: 1px solid var(--rule); white-space: nowrap }
td.n, th.n { text-align: right } tr.strong td { font-weight: 600; background: var(--paper); max-width: none }
td:not(.n) { max-width: 44ch; overflow: hidden; text-overflow: ellipsis }
tbody td:first-child { white-space: normal; min-width: 30ch; max-width: 60ch }
tbody td:last-child:not(.n) { white-space: normal; max-width: 90ch }
.claims td { white-space: normal; max-width: 44ch; min-width: 12ch }
.claims td:first-child { max-width: none; padding-left: 28px } .claims tr.strong td:first-child { padding-left: 11px }
.claims td.n, .claims td:nth-child(2) { white-space: nowrap }
input[type=search] { font: inherit; color: inherit; background: var(--card); padding: 6px 10px; margin-bottom: 10px;
  width: 320px; max-width: 100%; border: 1px solid var(--line); border-radius: 8px }
th[data-down="1"]::after { content: " \\2193" } th[data-down="0"]::after { content: " \\2191" }
.chip { display: inline-block; padding: 0 9px; border-radius: 999px; font-size: 13px; white-space: nowrap;
  background: var(--plain) }
.chip.done, .chip.supported { background: var(--good-back); color: var(--good) }
.chip.failed, .chip.not-supported { background: var(--bad-back); color: var(--bad) }
.chip.killed { background: var(--hurt-back); color: var(--hurt) }
.chip.unfinished, .chip.undecided, .chip.pruned { background: var(--open-back); color: var(--open) }
ul { margin: 0; padding-left: 20px }
@media print { .scroll { max-height: none } input, nav { display: none } }
"""

SCRIPT = """
for (const table of document.querySelectorAll(".sorted table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.dataset.down === "0";
    heads.forEach(other => delete other.dataset.down);
    head.dataset.down = down ? "1" : "0";
    const key = row => {
      const text = row.cells[column].textContent, value = parseFloat(text.replaceAll(",", ""));
      return /^[-+]?[0-9]/.test(text) ? [0, value, ""] : [1, 0, text];
    };
    const order = (a, b) => a[0] - b[0] || a[1] - b[1] || a[2].localeCompare(b[2]);
    const rows = [...body.rows].map(row => [key(row), row]).sort((a, b) => order(a[0], b[0]));
    body.append(...(down ? rows.reverse() : rows).map(pair => pair[1]));
  }));
}
for (const input of document.querySelectorAll("input[type=search]")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of input.parentElement.querySelector("tbody").rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""
