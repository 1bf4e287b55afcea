"""The style sheet of the report's page: light and dark, no outside references."""

CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #6b7280; --line: #d9dce1; --paper:
  #fff;
  --c0: #2563eb; --c1: #dc2626; --c2: #059669; --c3: #d97706; --c4: #7c3aed; --c5: #0891b2;
  --c6: #be185d; --c7: #4d7c0f }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151;
  --paper: #111418;
  --c0: #60a5fa; --c1: #f87171; --c2: #34d399; --c3: #fbbf24; --c4: #a78bfa; --c5: #22d3ee;
  --c6: #f472b6; --c7: #a3e635 } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-
  serif }
main { max-width: 1340px; margin: 0 auto; padding: 24px }
h1 { margin: 0 } h2 { margin-top: 32px }
table { border-collapse: collapse } td, th { padding: 3px 14px 3px 0; text-align: left; border-
  bottom: 1px solid var(--line) }
td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td:first-child { white-space: pre }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 20px;
  margin-top: 24px }
figure { margin: 0 } figcaption { font-weight: 600 }
svg { width: 100% } svg text { fill: var(--soft); font-size: 11px } svg .grid { stroke:
  var(--line) }
svg circle { stroke: none; fill: currentColor }
svg polyline { fill: none; stroke-width: 1.5 } .legend { margin: 0; color: var(--soft); font-
  size: 13px }
pre { white-space: pre-wrap; background: color-mix(in srgb, var(--line) 30%, transparent);
  padding: 10px; border-radius: 6px }
summary { cursor: pointer; font-weight: 600; margin-top: 16px }
.s0 { color: var(--c0); stroke: var(--c0) }
.s1 { color: var(--c1); stroke: var(--c1) }
.s2 { color: var(--c2); stroke: var(--c2) }
.s3 { color: var(--c3); stroke: var(--c3) }
.s4 { color: var(--c4); stroke: var(--c4) }
.s5 { color: var(--c5); stroke: var(--c5) }
.s6 { color: var(--c6); stroke: var(--c6) }
.s7 { color: var(--c7); stroke: var(--c7) }
span[class] { stroke: none }
"""
