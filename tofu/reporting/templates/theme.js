// Before anything is drawn: dark or light, as the reader chose or the system has it.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const apply = (theme) => {
    const on = theme ? theme === "dark" : dark.matches;
    document.documentElement.classList.toggle("dark", on);
    document.documentElement.style.colorScheme = on ? "dark" : "light";
    dispatchEvent(new Event("theme"));
  };
  window.switchTheme = () => {
    const theme = document.documentElement.classList.contains("dark") ? "light" : "dark";
    try { localStorage.setItem("theme", theme); } catch { /* a page from disk may have no storage */ }
    apply(theme);
  };
  dark.addEventListener("change", () => apply(stored()));
  apply(stored());
})();
