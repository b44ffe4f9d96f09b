"""The style sheet of the page: light and dark, no fonts or scripts from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1c1d21; --soft: #5b5e66; --line: #e2e2de; --tint: #f1f1ee; --link: #2f6db5;
  --passed: #1a7a48; --passed-tint: #e3f4ea; --failed: #b3261e; --failed-tint: #fde4e1;
  --unsupported: #8a5a00; --unsupported-tint: #fdf0d2; --inapplicable: #6a6d75; --inapplicable-tint: #ececea;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #15161a; --card: #1d1f24; --ink: #e8e8ea; --soft: #a3a6af; --line: #33363d; --tint: #262930; --link: #7db3f0;
  --passed: #74d69d; --passed-tint: #1c3327; --failed: #ff9a91; --failed-tint: #452422;
  --unsupported: #f0c36b; --unsupported-tint: #3a2f18; --inapplicable: #a7abb4; --inapplicable-tint: #2b2d33;
} }
.passed { --c: var(--passed); --t: var(--passed-tint); } .failed { --c: var(--failed); --t: var(--failed-tint); }
.not-supported { --c: var(--unsupported); --t: var(--unsupported-tint); }
.not-applicable { --c: var(--inapplicable); --t: var(--inapplicable-tint); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: clamp(1rem, 2.5vw, 2.25rem); }
p, h1, h2, h3, ul, ol, dl, dd { margin: 0; }
h1 { font-size: clamp(1.4rem, 3vw, 1.9rem); line-height: 1.25; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .75rem; }
a { color: var(--link); }
code { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.above { color: var(--soft); font-size: .8rem; letter-spacing: .04em; margin-bottom: .35rem; }
.below { color: var(--soft); margin-top: .5rem; max-width: 62rem; }
.bar { display: flex; gap: 2px; height: .7rem; margin: 1.5rem 0 .9rem; border-radius: .4rem; overflow: hidden; }
.bar i { min-width: 3px; background: var(--c); }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.counts > div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .65rem .9rem; }
.counts dt { color: var(--c); font-weight: 600; font-size: .9rem; }
.counts dd { color: var(--soft); font-size: .8rem; line-height: 1.4; }
.counts b { display: block; color: var(--ink); font-size: 1.6rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; }
.grid { width: 100%; font-size: .8rem; table-layout: fixed; min-width: 62rem; }
.grid thead th:first-child { width: 9.5rem; }
.grid th { font-weight: 400; }
.grid thead th { background: var(--tint); color: var(--soft); padding: .35rem .2rem; text-align: center; }
.grid thead tr:first-child th { color: var(--ink); font-weight: 600; font-size: .74rem; padding: .55rem .1rem .35rem; }
.grid .first { border-left: 1px solid var(--line); }
.grid tbody th { text-align: left; padding: .15rem .5rem .15rem .9rem; white-space: nowrap; font-size: .85rem;
  position: sticky; left: 0; background: var(--card); }
.grid td { padding: 2px; text-align: center; }
.grid tbody tr:first-child td, .grid tbody tr:first-child th { padding-top: .45rem; }
.grid tbody tr:last-child td, .grid tbody tr:last-child th { padding-bottom: .5rem; }
.grid tbody tr:hover th { color: var(--link); }
.grid td span { display: block; background: var(--t); color: var(--c); border-radius: .3rem; padding: .12rem .2rem;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.grid a { color: inherit; text-decoration: none; display: block; border-radius: .3rem; }
.grid a:hover > span, .grid td > span:hover { outline: 2px solid var(--c); outline-offset: -1px; }
.axes { columns: 3 19rem; column-gap: .75rem; }
.axes section { break-inside: avoid; margin-bottom: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .7rem .9rem; }
.axes h3 { font-size: .8rem; color: var(--soft); font-weight: 600; margin-bottom: .4rem; }
.axes div { display: grid; grid-template-columns: minmax(0, 1fr) 7rem 3.6rem; gap: .6rem; align-items: center;
  font-size: .84rem; line-height: 1.7; }
.axes .mini { display: flex; gap: 1px; height: .5rem; border-radius: .25rem; overflow: hidden;
  background: var(--tint); }
.mini i { background: var(--c); min-width: 2px; }
.axes .n { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.notes { list-style: none; padding: 0; display: grid; gap: .5rem; }
.notes li { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--c);
  border-radius: .35rem; padding: .5rem .8rem; overflow-wrap: anywhere; font-size: .88rem; scroll-margin-top: 1rem; }
.notes li:target { background: var(--t); }
.notes b { color: var(--c); font-weight: 600; }
.notes small { color: var(--soft); font-size: .8rem; }
summary { cursor: pointer; color: var(--soft); font-size: .8rem; margin-top: .15rem; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: .2rem; }
details code { display: block; }
.facts { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem;
  display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .88rem; }
.facts dt { color: var(--soft); } .facts dd { overflow-wrap: anywhere; }
@media (max-width: 40rem) { .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: .4rem; } }
@media print { body { background: #fff; } main { padding: 0; } .card { overflow: visible; } }
"""
