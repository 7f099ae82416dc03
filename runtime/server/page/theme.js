// Sets the chosen theme before anything is drawn; without a choice the system's holds (base.css). Not a module, so that
// it runs first.
"use strict";
try {
  const chosen = localStorage.getItem("roundexport.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage is refused: the system's theme holds */ }
