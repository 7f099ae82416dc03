// The two panels: beside the page where it is wide enough, over it (and alone in reach of the keyboard) where not.

import { byId } from "./dom.js";

const WIDE = matchMedia("(min-width: 70.01rem)");

/** Make a dialog and the button that opens it a panel. `others`: panels that close when it opens. */
export class Panel {
  constructor(name, others = []) {
    this.dialog = byId(name);
    this.button = byId(`open-${name}`);
    this.others = others;
    this.button.addEventListener("click", () => (this.dialog.open ? this.close() : this.open()));
    this.dialog.querySelector(".close").addEventListener("click", () => this.close());
    this.dialog.addEventListener("close", () => this.button.setAttribute("aria-expanded", "false"));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      this.close();
    });
    WIDE.addEventListener("change", () => {
      if (!this.dialog.open) return;
      this.dialog.close();
      this.open();
    });
  }

  open() {
    for (const other of this.others) if (other.dialog.open) other.dialog.close();
    if (WIDE.matches) this.dialog.show();
    else this.dialog.showModal();
    this.button.setAttribute("aria-expanded", "true");
    this.dialog.querySelector("h2").focus();
  }

  close() {
    this.dialog.close();
    this.button.focus();
  }
}
