"""How the HTML page looks and what a click in it does."""

STYLE = """
:root { color-scheme: light; --ink: #22252b; --faint: #6b7280; --line: #e5e7eb; --paper: #f6f7f9; --accent: #2f6690 }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
header, section { background: white; border: 1px solid var(--line); border-radius: 10px;
  max-width: 1320px; margin: 18px auto; padding: 18px 26px }
h1 { font-size: 25px; margin: 0 0 6px } h2 { font-size: 19px; margin: 0 0 12px }
header p { margin: 6px 0; max-width: 90ch }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 10px; font-size: 14px }
nav a { color: var(--accent); text-decoration: none } nav a:hover { text-decoration: underline }
figure { margin: 20px 0 4px; overflow-x: auto; text-align: center } img { max-width: 100%; height: auto }
.scroll { display: inline-block; max-width: 100%; overflow: auto; max-height: 640px;
  border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: separate; border-spacing: 0; font-size: 13px;
  font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: #eef1f4; text-align: left; padding: 7px 11px; cursor: pointer;
  white-space: nowrap; border-bottom: 1px solid var(--line); user-select: none }
th:first-child, td:first-child { position: sticky; left: 0; background: inherit } th:first-child { z-index: 2 }
thead tr { background: #eef1f4 } tbody tr { background: white } tbody tr:hover { background: #f3f7fb }
td { padding: 5px 11px; border-bottom: 1px solid #f0f1f3; white-space: nowrap }
td.n, th.n { text-align: right } tr.strong td { font-weight: 600; background: #f6f7f9; max-width: none }
td:not(.n) { max-width: 44ch; overflow: hidden; text-overflow: ellipsis }
tbody td:first-child { white-space: normal; min-width: 24ch; max-width: 60ch }
tbody td:last-child:not(.n) { white-space: normal; max-width: 90ch }
th[data-down="1"]::after { content: " \\2193" } th[data-down="0"]::after { content: " \\2191" }
input[type=search] { font: inherit; padding: 6px 10px; margin-bottom: 10px; width: 320px; max-width: 100%;
  border: 1px solid var(--line); border-radius: 8px }
.chip { display: inline-block; padding: 0 9px; border-radius: 999px; font-size: 13px; background: #e8eaee }
.chip.done, .chip.supported { background: #dcefe6; color: #1d6b4b }
.chip.failed, .chip.not-supported { background: #f8dfd9; color: #9b2f17 }
.chip.killed, .chip.pruned { background: #fbe9d0; color: #8a5a0b }
.chip.unfinished, .chip.undecided { background: #ece7f4; color: #55397f }
ul { margin: 0; padding-left: 20px }
@media print { .scroll { max-height: none } input, nav { display: none } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
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
