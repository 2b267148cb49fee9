// Sort a table by the column of a heading: ascending, descending, then the order of the report again.
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const text = (row, column) => row.cells[column].textContent.trim();
const number = value => (/^[-+]?(\d|\.\d|inf)/.test(value) ? parseFloat(value.replace("inf", "Infinity").replaceAll(",", "")) : NaN);
const compare = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = number(a) - number(b);
  return isNaN(difference) || difference === 0 ? collator.compare(a, b) : difference;
};
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  for (const head of table.querySelectorAll("th")) {
    head.querySelector("button").addEventListener("click", () => {
      const order = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const wanted = order === undefined ? "ascending" : order;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      if (wanted !== null) head.setAttribute("aria-sort", wanted);
      const sign = wanted === "descending" ? -1 : 1;
      const column = head.cellIndex;
      const sorted = wanted === null ? original
        : [...original].sort((a, b) => sign * compare(text(a, column), text(b, column)));
      body.append(...sorted);
    });
  }
}

// Save a table as CSV, the report as JSON, and a plot as PNG.
const save = (name, url) => {
  const link = document.createElement("a");
  link.download = name;
  link.href = url;
  link.click();
};
const saveText = (name, type, content) => {
  const url = URL.createObjectURL(new Blob([content], { type }));
  save(name, url);
  URL.revokeObjectURL(url);
};
// A cell that begins like a formula would be computed by a spreadsheet.
const quote = value => `"${(/^[=@\t]|^[-+](?![\d.])/.test(value) ? "'" + value : value).replaceAll('"', '""')}"`;
const stem = element => element.closest("section").querySelector("h2").textContent.trim().replace(/[^\w]+/g, "-").toLowerCase();
const actions = {
  csv: button => {
    const table = button.closest("section").querySelector("table");
    const lines = [...table.rows].map(row => [...row.cells].map(cell => quote(cell.textContent.trim())).join(","));
    saveText(`${stem(button)}.csv`, "text/csv", lines.join("\r\n") + "\r\n");
  },
  json: () => saveText("report.json", "application/json", document.getElementById("data").textContent),
  png: button => {
    const shown = button.closest("figure").querySelector("svg");
    const copy = shown.cloneNode(true);
    const { width, height } = shown.viewBox.baseVal;
    const styles = getComputedStyle(shown);
    for (const name of ["page", "ink", "muted", "grid", "edge", "pass", "fail", "unsure", "fail-soft", ...Array.from({ length: 8 }, (_, i) => `c${i + 1}`)])
      copy.style.setProperty(`--${name}`, styles.getPropertyValue(`--${name}`));
    copy.style.fontFamily = "sans-serif";
    copy.setAttribute("width", 4 * width);
    copy.setAttribute("height", 4 * height);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 4 * width;
      canvas.height = 4 * height;
      const context = canvas.getContext("2d");
      context.fillStyle = styles.getPropertyValue("--page");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      save(`${stem(button)}.png`, canvas.toDataURL("image/png"));
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  },
};
for (const button of document.querySelectorAll("button.tool"))
  button.addEventListener("click", () => actions[button.dataset.action](button));
