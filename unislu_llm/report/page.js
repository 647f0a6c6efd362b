// Tables that sort by their headers and filter by a word. Without it the page has all that it says.
"use strict";
for (const box of document.querySelectorAll(".scroll")) {
  const table = box.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  const key = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
  };
  // Numbers before words, and what is unknown last, in either order.
  const compare = (a, b, sign) => {
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * a.localeCompare(b, undefined, { numeric: true });
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...rows].sort((a, b) => compare(key(a, column), key(b, column), down ? -1 : 1)));
    });
  });
  if (rows.length < 6) continue;
  const tools = document.createElement("div"), label = document.createElement("label");
  const input = document.createElement("input"), status = document.createElement("span");
  tools.className = "tools";
  label.append("Filter: ", input);
  input.type = "search";
  input.setAttribute("aria-label", `Filter the rows of “${table.caption.textContent}”`);
  status.setAttribute("role", "status");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  tools.append(label, status);
  box.before(tools);
}
