"""The style of a report: colors for light and dark, type, tables that become lists on a phone, marks of drawings."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf6;--sheet:#f2f0e9;--ink:#1d1c19;--soft:#5c584f;--rule:#dfdbd0;
--accent:#0b5d55;--before:#b4632a;--b2:#bcd9d1;--b3:#86bdb0;--b4:#33877a;--b8:#0a3b37;--b16:#d9d4c6;
--on2:#1d1c19;--on3:#1d1c19;--on4:#fff;--on8:#fff;--on16:#1d1c19}
@media(prefers-color-scheme:dark){:root{--paper:#151513;--sheet:#1f1e1b;--ink:#ece9e1;--soft:#aca69a;--rule:#34322d;
--accent:#63c4b1;--before:#e0975f;--b2:#1f3f39;--b3:#2d675c;--b4:#479e8e;--b8:#aeebdd;--b16:#45423b;
--on2:#ece9e1;--on3:#ece9e1;--on4:#0a1f1b;--on8:#0a1f1b;--on16:#ece9e1}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:44rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .5rem}
h2{font-size:1.15rem;margin:2.75rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.75rem 0 .25rem}
h4{font-size:.9375rem;font-weight:600;margin:1.25rem 0 .25rem}
p{margin:.5rem 0}
.note{color:var(--soft);font-size:.875rem}
.warn{border-left:3px solid var(--before);padding-left:.75rem}
code{font:.8125rem/1.5 ui-monospace,"Cascadia Mono",Menlo,"Liberation Mono",monospace}
pre{margin:.25rem 0 .75rem;padding:.6rem .75rem;background:var(--sheet);border-radius:.3rem;white-space:pre-wrap;
overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:10rem 1fr;gap:.3rem 1rem;margin:.75rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
table{width:100%;font-size:.9375rem;border-collapse:collapse;margin:.75rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:400;font-size:.875rem}
tbody th{color:var(--ink);font-size:.9375rem;font-weight:600}
tbody th small{display:block;font-weight:400;font-size:.8125rem;color:var(--soft)}
td.n,th.n{text-align:right}td.one span{white-space:nowrap}
td:last-child,th:last-child{padding-right:0}
svg{display:block;max-width:100%;height:auto;margin:.5rem 0;overflow:visible;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(156px,1fr));gap:1rem 16px;margin:.75rem 0}
.halves{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:1rem 24px}
.halves h3{margin-top:.5rem}
.narrow{display:none}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem;color:var(--soft);list-style:none;padding:0;
margin:.5rem 0}
.key i{display:inline-block;width:.85rem;height:.85rem;margin-right:.4rem;vertical-align:-.08rem;border-radius:2px}
svg text{fill:var(--ink)}
svg .soft{fill:var(--soft)}
svg .name{font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
polyline{fill:none}
.grid{stroke:var(--rule)}
.axis{stroke:var(--soft)}
.before,.after,.front{stroke-width:1.75;stroke-linejoin:round}
.before{stroke:var(--before);stroke-dasharray:4 2}
.after{stroke:var(--accent)}
.front{stroke:var(--accent);stroke-opacity:.45}
.before-dot{fill:var(--before)}
.after-dot,.bar{fill:var(--accent)}
.mark{stroke:var(--before);stroke-width:1.5}
.b2{fill:var(--b2);background:var(--b2)}.b3{fill:var(--b3);background:var(--b3)}
.b4{fill:var(--b4);background:var(--b4)}.b8{fill:var(--b8);background:var(--b8)}
.b16{fill:var(--b16);background:var(--b16)}
svg .on2{fill:var(--on2)}svg .on3{fill:var(--on3)}svg .on4{fill:var(--on4)}svg .on8{fill:var(--on8)}
svg .on16{fill:var(--on16)}
.i-before{background:var(--before)}.i-after{background:var(--accent)}
@media(max-width:42rem){
.narrow{display:block}.wide{display:none}
dl{grid-template-columns:1fr;gap:0}dd{margin:0 0 .6rem}
table.wraps thead{position:absolute;clip-path:inset(50%);height:1px;overflow:hidden}
table.wraps tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--rule)}
table.wraps th,table.wraps td{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;border:0;
text-align:right}
table.wraps tbody th{display:block;text-align:left}
table.wraps td.one span{white-space:normal}
table.wraps td::before{content:attr(data-name);color:var(--soft);text-align:left}
}
@media print{body{max-width:none}pre{white-space:pre-wrap}h2{break-after:avoid}svg{break-inside:avoid}}
"""
