// The page of `easyref ui`: references with weights, the settings, a drawing as it comes, pictures that give their settings back.
// The server (serve.py) checks everything; what it says in {error} is shown as it is.

const $ = id => document.getElementById(id)
const copy = id => $(id).content.firstElementChild.cloneNode(true)
const SETTINGS = ['prompt', 'negative_prompt', 'steps', 'guidance', 'scale', 'width', 'height', 'window_start', 'window_end']
const STOPPED = 'The server stopped in the middle; look at its log.'
const references = []      // {kept, weight, negative, element}, in the order they are drawn with
let wanted = []            // references of a picture whose settings were taken, here or not
let limits = {}            // of GET /model
let running = null         // AbortController of the drawing

async function ask(path, options) {
  let answer
  try { answer = await fetch(path, options) } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new Error('The server does not answer; is `easyref ui` still running?')
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `${path}: ${answer.status}`)
  return answer
}

function say(text, bad = false) {
  $('notice').textContent = text
  $('notice').hidden = !text
  $('notice').classList.toggle('bad', bad)
}

// References

async function upload(file) {
  if (file.size > limits.max_bytes) throw new Error(`${file.name}: over ${limits.max_bytes / 2 ** 20} MiB; save it smaller.`)
  return (await ask(`/references?name=${encodeURIComponent(file.name.slice(-255))}`, { method: 'POST', body: file })).json()
}

const stands = (one, used) => one.kept.sha256 === used.sha256 && one.negative === used.negative
const placed = negative => references.filter(one => one.negative === negative)

function addTile(kept, negative, weight = 1) {
  if (references.some(one => stands(one, { sha256: kept.sha256, negative }))) return
  if (placed(negative).length >= limits.max_references) throw new Error(`The model takes at most ${limits.max_references} references; ${kept.name} was left out.`)
  const one = { kept, weight, negative, element: copy('tile') }, slider = one.element.querySelector('input')
  const image = one.element.querySelector('img')
  image.src = kept.thumbnail
  image.alt = image.title = `${kept.name}, ${kept.width}×${kept.height}`
  image.classList.toggle('small', kept.width <= 128)
  slider.value = weight
  slider.addEventListener('input', () => { one.weight = +slider.value; showWeight(one) })
  one.element.querySelector('.remove').addEventListener('click', () => { references.splice(references.indexOf(one), 1); wanted = []; showTiles() })
  references.push(one)
  showWeight(one)
}

// Alone: a slider that is put in its place again loses focus and drag.
function showWeight({ element, weight }) {
  element.querySelector('.weight').textContent = `×${weight.toFixed(1)}`
  element.classList.toggle('off', weight === 0)
}

function showTiles() {
  const place = one => (wanted.findIndex(used => stands(one, used)) + wanted.length + 1) % (wanted.length + 1)
  if (wanted.length) references.sort((a, b) => place(a) - place(b))
  for (const [id, negative] of [['references', false], ['against', true]]) {
    const here = placed(negative)
    $(id).querySelector('.tiles').replaceChildren(...here.map(one => one.element))
    $(id).querySelector('.count').textContent = here.length ? `${here.length} of at most ${limits.max_references}` : ''
  }
  $('references').querySelector('.add b').textContent = placed(false).length ? 'Add more' : 'Drop images here'
}

async function addFiles(files, negative = false, dropped = true) {
  say('')
  const faults = []
  for (const file of files) {
    try {
      const kept = await upload(file)
      const used = wanted.find(used => used.sha256 === kept.sha256 && !references.some(one => stands(one, used)))
      addTile(kept, used?.negative ?? negative, used?.weight)
      if (wanted.length) tellMissing()
      if (dropped && kept.settings && !wanted.length) say(`${kept.name} was drawn by easyref. Drop it on the right to take its settings instead.`)
    } catch (error) { faults.push(error.message) }
    showTiles()
  }
  if (faults.length) say(faults.join(' · '), true)
}

// Settings

function put(input, value) {
  if (value > +input.max) input.max = value
  input.value = value
  if (input.value !== String(value)) { input.step = 'any'; input.value = value } // between two steps of the slider
  input.dispatchEvent(new Event('input'))
}

function show(settings) {
  const byBlock = typeof settings.scale === 'object', [window_start, window_end] = settings.window
  const { side } = limits, width = settings.width ?? side, height = settings.height ?? side
  const values = { ...settings, scale: byBlock ? 1 : settings.scale, window_start, window_end, width, height }
  for (const name of SETTINGS) put($(name), values[name])
  showBlocks(byBlock && settings.scale)
  $('more').open ||= byBlock || window_start > 0 || window_end < 1 || width !== side || height !== side
}

// Sliders for `scales`, numbers by block; false: one number for all of them.
function showBlocks(scales) {
  $('by_block').checked = Boolean(scales)
  $('scale').disabled = Boolean(scales)
  $('blocks').replaceChildren(...Object.entries(scales || {}).map(([name, value]) => {
    const label = copy('block'), slider = label.querySelector('input')
    label.querySelector('span').textContent = name
    slider.name = name
    slider.addEventListener('input', () => { label.querySelector('output').textContent = slider.value })
    put(slider, value)
    return label
  }))
}

function tellMissing() {
  const missing = wanted.filter(used => !references.some(one => stands(one, used))).map(used => used.name)
  say(missing.length ? `To draw it again, add its references too: ${missing.join(', ')}` : '')
}

async function restore(settings) {
  if (!Number.isSafeInteger(settings.seed)) return say(`Its seed is too large for a browser; use \`easyref generate --from\`.`, true)
  show(settings)
  $('seed').value = settings.seed
  $('random').checked = false
  $('num').value = 1
  wanted = settings.references
  references.length = 0
  for (const used of wanted) {
    const answer = await fetch(`/references/${used.sha256}`)
    if (answer.ok) addTile(await answer.json(), used.negative, used.weight)
  }
  showTiles()
  tellMissing()
}

async function openPicture(file) {
  say('')
  try {
    const kept = await upload(file)
    if (kept.settings) await restore(kept.settings)
    else say(`${kept.name}: no settings in it; drop it on References to draw with it.`, true)
  } catch (error) { say(error.message, true) }
}

// Drawing

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (;;) {
    const { value, done } = await reader.read().catch(error => { throw error.name === 'AbortError' ? error : new Error(STOPPED) })
    if (done) return
    const parts = (rest + value).split('\n')
    rest = parts.pop()
    for (const part of parts) yield JSON.parse(part)
  }
}

function showPicture(place, { image, seed }, name) {
  const figure = copy('picture'), bytes = Uint8Array.from(atob(image), c => c.charCodeAt(0))
  const file = new File([bytes], name, { type: 'image/png' }), picture = figure.querySelector('img')
  picture.addEventListener('load', () => picture.classList.toggle('small', picture.naturalWidth <= 128))
  picture.src = figure.querySelector('.large').href = figure.querySelector('.save').href = URL.createObjectURL(file)
  picture.alt = `Picture with seed ${seed}`
  figure.querySelector('.save').download = name
  figure.querySelector('.seed').textContent = seed
  figure.querySelector('.reuse').addEventListener('click', () => addFiles([file], false, false))
  place.append(figure)
  return file
}

function asks() {
  const { window_start, window_end, ...asked } = Object.fromEntries(
    SETTINGS.map(name => [name, $(name).type === 'textarea' ? $(name).value : +$(name).value]))
  asked.window = [window_start, window_end]
  if ($('by_block').checked) asked.scale = Object.fromEntries([...$('blocks').querySelectorAll('input')].map(slider => [slider.name, +slider.value]))
  asked.num = +$('num').value
  asked.references = placed(false).map(one => one.kept.sha256)
  asked.weights = placed(false).map(one => one.weight)
  asked.negative_references = placed(true).map(one => one.kept.sha256)
  if (!$('random').checked && $('seed').value !== '') asked.seed = +$('seed').value
  return asked
}

async function draw() {
  const asked = asks(), count = references.length
  const batch = copy('batch'), bar = batch.querySelector('progress'), stage = batch.querySelector('.stage'), again = batch.querySelector('.again')
  batch.querySelector('.words').textContent = asked.prompt || 'No prompt'
  batch.querySelector('.detail').textContent =
    `${count} reference${count === 1 ? '' : 's'} · likeness ${$('by_block').checked ? 'by block' : asked.scale} · guidance ${asked.guidance} · ` +
    `${asked.steps} steps · ${asked.width}×${asked.height}`
  again.hidden = true
  running = new AbortController()
  batch.querySelector('.cancel').addEventListener('click', () => running?.abort())
  $('empty').hidden = true
  $('gallery').prepend(batch)
  bar.removeAttribute('value')
  stage.textContent = 'Starting'
  let made = null
  try {
    const headers = { 'Content-Type': 'application/json', Accept: 'application/x-ndjson' }
    const answer = await ask('/generate', { method: 'POST', headers, body: JSON.stringify(asked), signal: running.signal })
    for await (const event of lines(answer.body)) {
      if (event.error) throw new Error(event.error)
      if (event.ahead) stage.textContent = `${event.ahead} before this`
      if (event.step === 0) stage.textContent = 'Reading references'
      if (event.step) { bar.value = event.step / event.steps; stage.textContent = `Step ${event.step} of ${event.steps}` }
      if (event.images) made = event.images
    }
    if (!made) throw new Error(STOPPED)
    const files = made.map(one => showPicture(batch.querySelector('.pictures'), one, `easyref-${one.seed}.png`))
    $('seed').value = made[0].seed
    batch.querySelector('.progress').remove()
    again.hidden = false
    again.addEventListener('click', async () => {
      await openPicture(files[0])
      $('num').value = files.length
    })
  } catch (error) {
    batch.remove()
    $('empty').hidden = $('gallery').querySelector('article') !== null
    if (error.name !== 'AbortError') say(error.message, true)
  } finally { running = null }
}

// Wiring

$('form').addEventListener('submit', async event => {
  event.preventDefault()
  if (running) return
  say('')
  $('go').disabled = true
  await draw()
  $('go').disabled = false
})
document.addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit() })
for (const [id, take] of [['files', addFiles], ['against_files', files => addFiles(files, true)], ['open', files => openPicture(files[0])]])
  $(id).addEventListener('change', async () => { const files = [...$(id).files]; $(id).value = ''; if (files.length) await take(files) })
$('by_block').addEventListener('change', event =>
  showBlocks(event.target.checked && Object.fromEntries(limits.blocks.map(name => [name, +$('scale').value]))))
$('more').addEventListener('invalid', () => { $('more').open = true }, true) // a field in it that the browser will point at
for (const output of document.querySelectorAll('output')) {
  const input = $(output.htmlFor.value)
  input.addEventListener('input', () => { output.textContent = input.value })
}
$('seed').addEventListener('input', () => { $('random').checked = $('seed').value === '' })

const PLACES = ['against', 'references', 'gallery']

function target(event) {
  const within = selector => event.target instanceof Element && event.target.closest(selector)
  return within('#against') ? 'against' : within('#form') ? 'references' : 'gallery'
}
const isText = event => event.target instanceof HTMLTextAreaElement && !event.dataTransfer.types.includes('Files')
document.addEventListener('dragover', event => {
  if (isText(event)) return
  event.preventDefault()
  for (const id of PLACES) $(id).classList.toggle('over', id === target(event))
})
for (const kind of ['dragleave', 'drop']) document.addEventListener(kind, () => PLACES.forEach(id => $(id).classList.remove('over')))
document.addEventListener('drop', event => {
  if (isText(event)) return
  event.preventDefault()
  const files = [...event.dataTransfer.files]
  if (files.length) target(event) === 'gallery' ? openPicture(files[0]) : addFiles(files, target(event) === 'against')
})
document.addEventListener('paste', event => { const files = [...event.clipboardData.files]; if (files.length) { event.preventDefault(); addFiles(files) } })

try {
  limits = await (await ask('/model')).json()
  $('model').textContent = `${limits.name} · ${limits.sha256.slice(0, 8)}`
  $('num').max = limits.max_images
  for (const id of ['width', 'height']) Object.assign($(id), { min: limits.side / 2, max: 2 * limits.side })
  show(limits.defaults)
} catch (error) { say(error.message, true) }
