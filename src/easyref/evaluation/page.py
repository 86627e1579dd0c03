"""The HTML of reports/evaluation.html (jinja2); `report` fills it in. No script, nothing fetched."""

_TABLE = """
<div class="scroll"><table><thead><tr><th>Metric</th><th>no references</th><th>another group's</th><th>right</th>
<th>real image</th><th>right − another group's</th><th>right −
none</th><th>covered</th><th>samples</th></tr></thead><tbody>
{% for name, title in label.items() if entries.get(name) %}{% set e = entries[name] %}
<tr><td>{{ title }}</td><td>{{ e.none | num }}</td><td>{{ e.shuffled | num }}</td>
<td class="own">{{ e.right | num }}</td>
<td>{{ e.ceiling | num }}</td><td>{{ e.right_minus_shuffled | gap }}</td><td>{{ e.right_minus_none | gap }}</td>
<td>{{ e.covered | pct }}</td><td>{{ e.samples }}</td></tr>
{% endfor %}</tbody></table></div>
"""

_SPLIT = (
    """
<h2>{{ split_title[s] }}</h2>
<ul class="head">{% for h in headlines if h.split == s %}
<li><span class="tag {{ h.verdict }}">{{ h.tag }}</span><b>{{ h.label }}.</b> {{ h.words }}
{% if h.covered != '–' %}The right references cover {{ h.covered }} of the way from text alone to a real image.
{% else %}Real images of the group do not score above text alone here, so there is no distance to
cover.{% endif %}</li>
{% endfor %}</ul>
<figure><img alt="Scores of the three conditions and of real images" src="{{ plots[s] }}">
<figcaption>Where each condition stands between text alone and a real image.</figcaption></figure>
{% set entries = result[s] %}
"""
    + _TABLE
    + """
{% for kind, entries in result[s].by_kind.items() %}
<h3>{{ kind_title.get(kind, kind) }}</h3>
"""
    + _TABLE
    + "{% endfor %}"
)

_COPYING = """
<h2>Is it copying?</h2>
<p>A pasted reference would score high on fidelity. Distances are mean squared errors of pixels (0 to 1) at 64 px;
a copy is
closer than {{ copy_threshold }}. The rows of real targets are the measure: the sets have siblings that are nearly
equal.</p>
<div class="scroll"><table><thead><tr><th>Images</th><th>copies of a reference</th>
<th>nearer to a reference than to the target</th><th>copies of a training image</th>
<th>median distance to the training set</th></tr></thead><tbody>
{% for s in splits %}{% for name, title in copied.items() %}{% set c = result.copying[s][name] %}
<tr><td>{{ s | replace('_', '-') }}, {{ title }}</td><td>{{ c.copied_reference | pct }}</td>
<td>{{ c.nearer_to_reference | pct if name != 'real' else '–' }}</td><td>{{ c.copied_training | pct }}</td>
<td>{{ c.nearest_training | num }}</td></tr>{% endfor %}{% endfor %}
</tbody></table></div>
"""

_LIMITS = """
<h2>What these numbers can and cannot show</h2>
<p>The images are emoji, designed artwork of 64 × 64 pixels. Nothing here is a claim about photographs or faces.</p>
{% set t = result.extractor_trust %}
<p>The measuring models are small. On {{ t.images }} real images of concepts they never saw
({{ t.split | replace('_', '-') }})
they reach: style {{ t.style.accuracy | pct }} (chance {{ t.style.chance | pct }}),
{% if t.tone %}skin tone {{ t.tone.accuracy | pct }} (chance {{ t.tone.chance | pct }}), {% endif %}
{% if t.concept %}concept {{ t.concept.accuracy | pct }} among {{ t.concept.candidates }} candidates (chance
{{ t.concept.chance | pct }}), {% endif %}
the right caption among {{ t.text_alignment.captions }} first in {{ t.text_alignment.recall_at_1 | pct }} and in
the first five in
{{ t.text_alignment.recall_at_5 | pct }}. {% if t.same_concept_auc %}The fidelity features tell “same concept,
other style” from
“other concept, other style” with an AUC of {{ t.same_concept_auc | num }}. {% endif %}No number here is a CLIP or
a DINO score.</p>
<p>The ceiling is a real image, not a perfect answer. Fidelity's ceiling is another real member of the group: in
groups that
share only a style or a person, two real members show different things and are far apart, and a text that names the
subject can pass them. Read the three kinds apart.</p>
<p>For the kind subject the concept centres are made of the images that also serve as references: a copied
reference scores
as the right concept. Read that number beside the copying table.</p>
<h3>The metrics</h3>
<table><tbody>{% for name, title in label.items() %}
<tr><td>{{ title }}</td><td class="words">{{ meaning[name] }}</td></tr>{% endfor %}</tbody></table>
{% if result.samples.failures %}<h3>Failed samples</h3><ul>
{% for line in result.samples.failures %}<li class="soft">{{ line }}</li>{% endfor %}</ul>{% endif %}
<p class="soft">Artwork: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji (MIT), EmojiOne 2 (CC BY 4.0).</p>
"""

PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>easyref: do the references help?</title><style>{{ style }}</style></head><body><main>
<h1>Do the references help?</h1>
<p>Every sample was drawn three times from the same prompt and the same noise: with the right reference images,
with as many
references of another group, and with none. The three differ only in what the references bring. Intervals are 95 %
bootstrap intervals over groups.</p>
<p class="soft">{% for s in splits %}{{ split_title[s] }}: {{ result.samples[s].samples }} samples in
{{ result.samples[s].groups }} groups. {% endfor %}{{ result.samples.failed }} samples failed.
Weights {{ result.settings.weights[:12] }}, seed {{ result.settings.seed }}, {{ result.settings.steps }} steps,
guidance {{ result.settings.guidance }}, scale {{ result.settings.scale }}.</p>
{% if grid %}<figure><img alt="Grid of references, prompts, targets and generations" src="{{ grid }}">
<figcaption>The first {{ per_kind }} held-out groups of each kind in the seeded order of the evaluation, not chosen
by result.
64-pixel images at twice their size.</figcaption></figure>{% endif %}
{% for s in splits %}"""
    + _SPLIT
    + "{% endfor %}"
    + _COPYING
    + _LIMITS
    + "</main></body></html>\n"
)
