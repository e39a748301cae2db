"use strict";
for (const item of JSON.parse(document.getElementById("charts").textContent)) Bokeh.embed.embed_item(item);

const SECONDS = {second: 1, minute: 60, hour: 3600, day: 86400};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].textContent.trim();
      const number = row =>
        parseFloat(value(row).replace(/[<,]/g, "")) * (SECONDS[value(row).match(/([a-z]+?)s?$/)?.[1]] ?? 1);
      const missing = row => Number.isNaN(number(row));
      const rows = [...table.tBodies[0].rows];
      const numeric = head.classList.contains("number");
      const order = (a, b) => numeric ? number(a) - number(b) : value(a).localeCompare(value(b));
      const sorted = rows.sort((a, b) =>
        (numeric && missing(a) - missing(b)) || (down ? -order(a, b) : order(a, b)));
      table.tBodies[0].append(...sorted);
    });
  });
}
