"""The HTML of reports/evaluation.html (jinja2); `report` fills it in. No script, nothing fetched."""

_TABLES = """
{% macro means(entries, names) %}<div class="scroll"><table><thead><tr><th>Mean</th>
{% for name in names %}<th>{{ label[name] }}</th>{% endfor %}</tr></thead><tbody>
{% for m, (title, colour, what) in methods.items() %}<tr><td><i style="background:{{ colour }}"></i>{{ title }}</td>
{% for name in names %}<td{% if m == 'easyref' %} class="own"{% endif %}>{{ entries[name][m] | num }}
<small>{{ entries[name].intervals[m][0] | num }} … {{ entries[name].intervals[m][1] | num }}</small></td>{% endfor %}</tr>
{% endfor %}<tr class="soft"><td>samples, groups</td>{% for name in names %}<td>{{ entries[name].samples }},
{{ entries[name].groups }}</td>{% endfor %}</tr></tbody></table></div>{% endmacro %}
{% macro gaps(entries, names) %}<div class="scroll"><table><thead><tr><th>EasyRef minus …</th>
{% for name in names %}<th>{{ label[name] }}</th>{% endfor %}</tr></thead><tbody>
{% for m in others %}<tr><td><i style="background:{{ methods[m][1] }}"></i>{{ methods[m][0] }}</td>
{% for name in names %}{% set g = entries[name]['easyref_minus_' + m] %}
<td class="gap {{ g | verdict }}">{{ '%+.3f' | format(g.mean) }}
<small>{{ '%+.3f' | format(g.low) }} … {{ '%+.3f' | format(g.high) }}</small></td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
"""

_SPLIT = """
<h2>{{ split_title[s] }}</h2>
{% set f = result[s].fidelity %}
<ul class="head">{% for m in others if m != 'copy' %}{% set g = f['easyref_minus_' + m] %}
<li><span class="tag {{ g | verdict }}">{{ (g | verdict) or 'undecided' }}</span>
Fidelity to the target with EasyRef {{ f.easyref | num }}, <b>{{ methods[m][0] }}</b> {{ f[m] | num }}:
difference {{ g | gap }}.</li>{% endfor %}</ul>
<figure><img alt="Means and intervals of all methods, a panel for each metric" src="{{ plots[s] }}">
<figcaption>Means with 95 % intervals; the dashed line is a real image.</figcaption></figure>
{{ means(result[s], shown[s]) }}
{{ gaps(result[s], shown[s]) }}
{% for by, title in [('by_kind', 'By kind'), ('by_references', 'By the number of references a sample has')] %}
<details><summary>{{ title }}</summary>
{% for value, entries in result[s][by].items() %}{% set names = entries | defined %}
<h3>{{ kind_title.get(value, value) if by == 'by_kind' else value + ' references' }}</h3>
{{ means(entries, names) }}{{ gaps(entries, names) }}{% endfor %}</details>{% endfor %}
"""

_READING = """
<h2>How should several references be read?</h2>
<p>The paper's ablation, at our scale: the MLLM reads all references at once, or each alone and their tokens are averaged or put
side by side. The paper's figures are of SDXL on photographs, on its own MRBench and with other metrics (CLIP-I, CLIP-T, DINO-I): only
the order of the rows can be compared.</p>
<div class="scroll"><table><thead><tr><th>Held-out</th><th>fidelity, here</th><th>EasyRef minus it</th><th>fits the prompt, here</th>
<th>CLIP-I, paper</th><th>CLIP-T, paper</th><th>DINO-I, paper</th></tr></thead><tbody>
{% set e = result.held_out %}{% for m, figures in paper.items() %}
<tr><td><i style="background:{{ methods[m][1] }}"></i>{{ methods[m][0] }}</td><td>{{ e.fidelity[m] | num }}</td>
<td>{{ e.fidelity['easyref_minus_' + m] | gap if m != 'easyref' else '' }}</td><td>{{ e.text_alignment[m] | num }}</td>
{% for x in figures %}<td>{{ x | num }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
"""

_COUNTS = """
{% if counts %}<h2>How many references?</h2>
<p>The same held-out samples ({{ (result.counts.values() | first).fidelity.samples }} in
{{ (result.counts.values() | first).fidelity.groups }} groups) with 1, 2, 4 … of their references, drawn from the same noise.</p>
<figure><img alt="Scores over the number of references" src="{{ counts }}">
<figcaption>Means with 95 % intervals over groups.</figcaption></figure>
<div class="scroll"><table><thead><tr><th>References</th><th>fidelity, EasyRef</th><th>average</th><th>EasyRef minus average</th>
<th>fidelity to all references, EasyRef</th><th>average</th><th>EasyRef minus average</th></tr></thead><tbody>
{% for count, entry in result.counts.items() %}<tr><td>{{ count }}</td>
{% for name in ('fidelity', 'reference_fidelity') %}{% set e = entry[name] %}
<td>{{ e.easyref | num }}</td><td>{{ e.average | num }}</td>
<td class="gap {{ e.easyref_minus_average | verdict }}">{{ e.easyref_minus_average | gap }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
"""

_COPYING = """
<h2>Is it copying, is it varied, does it look like the data?</h2>
<p>A pasted reference would score high on fidelity. Distances are mean squared errors of pixels (0 to 1) at 64 px; a copy is
closer than {{ copy_threshold }}. The real targets are the measure: the sets have siblings that are nearly equal. FID and KID compare
Lite0's features of the images with those of the real targets; with so few images FID is far too large for all, and KID
is the one to read.</p>
{% for s in splits %}<h3>{{ split_title[s] }}</h3>
<div class="scroll"><table><thead><tr><th>Images</th><th>copies of a reference</th>
<th>nearer to a reference than to the target</th><th>copies of a training image</th>
<th>median distance to the training set</th><th>KID</th><th>FID</th></tr></thead><tbody>
{% for name in (methods | list + ['real']) if name in result.copying[s] %}
{% set c = result.copying[s][name] %}{% set d = (result.distribution[s] or {}).get(name) %}
<tr><td>{% if name in methods %}<i style="background:{{ methods[name][1] }}"></i>{{ methods[name][0] }}{% else %}Real
targets{% endif %}</td><td>{{ c.copied_reference | pct }}</td>
<td>{{ c.nearer_to_reference | pct if name != 'real' else '–' }}</td><td>{{ c.copied_training | pct }}</td>
<td>{{ c.nearest_training | num }}</td><td>{{ d.kid | num if d else '–' }}</td>
<td>{{ '%.1f' | format(d.fid) if d else '–' }}</td></tr>{% endfor %}
</tbody></table></div>{% endfor %}
{% if result.diversity %}<p>Under {{ result.diversity.seeds }} seeds a sample's images differ by (1 − mean cosine of features,
{{ result.diversity.samples }} samples): EasyRef {{ result.diversity.easyref | gap }}, text only {{ result.diversity.text_only | gap }};
the real images of its group {{ result.diversity.real | gap }}.</p>{% endif %}
"""

_LIMITS = """
<h2>What these numbers can and cannot show</h2>
{% if emoji %}<p>The images of the preset nano are emoji, designed artwork of 64 × 64 pixels. Nothing here is a claim about
photographs or faces.</p>{% endif %}
{% set t = result.extractor_trust %}
<p>The measuring models are small. On {{ t.images }} real images that they never saw ({{ t.split | replace('_', '-') }})
they reach: {% if t.style %}style {{ t.style.accuracy | pct }} (chance {{ t.style.chance | pct }}), {% endif %}
{% if t.tone %}skin tone {{ t.tone.accuracy | pct }} (chance {{ t.tone.chance | pct }}), {% endif %}
{% if t.concept %}concept {{ t.concept.accuracy | pct }} among {{ t.concept.candidates }} candidates (chance
{{ t.concept.chance | pct }}), {% endif %}
the right caption among {{ t.text_alignment.captions }} first in {{ t.text_alignment.recall_at_1 | pct }} and in
the first five in
{{ t.text_alignment.recall_at_5 | pct }}. {% if t.same_concept_auc %}The fidelity features tell “same concept,
other style” from
“other concept, other style” with an AUC of {{ t.same_concept_auc | num }}. {% endif %}
{% if not result.settings.clip %}No number here is a CLIP or a DINO score.{% endif %}</p>
<p>The LoRA is tuned for {{ result.settings.lora.steps }} steps of {{ result.settings.lora.batch }} images, rank
{{ result.settings.lora.rank }}, for every sample: minutes of such tuning are what EasyRef spares, and longer tuning may score
otherwise.</p>
<p>The ceiling is a real image, not a perfect answer. Fidelity's ceiling is another real member of the group: in
groups that
share only a style or a person, two real members show different things and are far apart, and a text that names the
subject can pass them. Read the three kinds apart.</p>
<p>For the kind subject the concept centres are made of the images that also serve as references: a copied
reference scores
as the right concept. Read that number beside the copying table.</p>
<h3>The methods</h3>
<table><tbody>{% for m, (title, colour, what) in methods.items() %}
<tr><td><i style="background:{{ colour }}"></i>{{ title }}</td><td class="words">{{ what }}</td></tr>{% endfor %}</tbody></table>
<h3>The metrics</h3>
<table><tbody>{% for name in shown.values() | first %}
<tr><td>{{ label[name] }}</td><td class="words">{{ meaning[name] }}</td></tr>{% endfor %}</tbody></table>
{% if result.samples.failures %}<h3>Failed samples</h3><ul>
{% for line in result.samples.failures %}<li class="soft">{{ line }}</li>{% endfor %}</ul>{% endif %}
<h2>Made with</h2>
<table><tbody>{% for name, value in about.items() %}
<tr><td>{{ name }}</td><td class="words"><code>{{ value }}</code></td></tr>{% endfor %}</tbody></table>
{% if emoji %}<p class="soft">Artwork: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji (MIT), EmojiOne 2 (CC BY 4.0).</p>
{% endif %}"""

_STYLE = """
td small { display: block; color: #8a929c; font-size: 11px }
td:first-child { white-space: nowrap }
table + .scroll, .scroll + .scroll { margin-top: 22px }
td i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 8px }
td.gap.better, td.gap.worse { color: #fff }
td.gap.better { background: #eaf5ee; color: #1d6b3d }
td.gap.worse { background: #faecea; color: #a3311f }
details { margin: 14px 0; border: 1px solid #e3e6ea; border-radius: 6px; padding: 8px 14px }
summary { cursor: pointer; font-weight: 600; color: #3c4550 }
code { font-size: 12.5px; overflow-wrap: anywhere }
"""

PAGE = (
    _TABLES
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>easyref: MRBench</title><style>{{ style }}"""
    + _STYLE
    + """</style></head><body><main>
<h1>Do references help, and reading them together?</h1>
<p>Every sample was drawn by every method from the same prompt and the same noise. The methods differ only in the references and in how
they are read. Intervals are 95 % bootstrap intervals over groups, differences are paired.</p>
<p class="soft">{% for s in splits %}{{ split_title[s] }}: {{ result.samples[s].samples }} samples in
{{ result.samples[s].groups }} groups. {% endfor %}{{ result.samples.failed }} samples failed.
Seed {{ result.settings.seed }}, {{ result.settings.steps }} steps, guidance {{ result.settings.guidance }}, scale
{{ result.settings.scale }}.</p>
{% if grid %}<figure><img alt="Grid of references, prompts, targets and generations" src="{{ grid }}">
<figcaption>Held-out samples by three rules: the first {{ rows }} of the seeded order, and of the others the {{ rows }} with EasyRef's
highest and the {{ rows }} with its lowest fidelity to the target.</figcaption></figure>{% endif %}
{% for s in splits %}"""
    + _SPLIT
    + "{% endfor %}{% if result.held_out.fidelity %}"
    + _READING
    + "{% endif %}"
    + _COUNTS
    + _COPYING
    + _LIMITS
    + "</main></body></html>\n"
)
