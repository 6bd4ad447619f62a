// ---- keys ----
function nextButton(step) {
  const buttons = [...document.querySelectorAll("#table button.open")];
  const at = buttons.indexOf(document.activeElement?.closest("tr")?.querySelector("button.open"));
  buttons[at < 0 ? 0 : Math.min(buttons.length - 1, Math.max(0, at + step))]?.focus();
}
function leave(search) { // cleared and left, so that the next letter is a key again
  search.value = "";
  search.dispatchEvent(new Event("input", { bubbles: true }));
  if (search === byId("find")) byId("rows").focus();
  else search.blur();
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open || byId("columns").open) return;
  const inside = dialog.open;
  const typing = event.target.matches("input, select, textarea");
  const arrows = inside ? !typing || event.target === byId("find") : event.target.matches("button.open");
  const step = { ArrowDown: arrows && 1, ArrowUp: arrows && -1, j: !typing && 1, k: !typing && -1 }[event.key];
  if (step) (inside ? nextRow : nextButton)(step);
  else if (event.key === "Escape" && event.target.matches("input[type=search]") && event.target.value) leave(event.target);
  else if (typing) return;
  else if (event.key === "/") (inside ? byId("find") : document.querySelector(".dt-search input")).focus();
  else if (event.key === "?") byId("keys").showModal();
  else if (inside && (event.key === "n" || event.key === "p")) nextRun(event.key === "n" ? 1 : -1);
  else return;
  event.preventDefault();
});

// ---- what the link opens ----
if (link.run !== null) {
  const i = runs.findIndex((run) => run.name === link.run);
  if (i >= 0) openRun(i, link.row);
}
document.documentElement.dataset.ready = "true";
performance.mark("ready");
