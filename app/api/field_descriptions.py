"""What each request field means, in Markdown: for GET /openapi.json, and for the table of docs/api.md, whose rows begin
with these sentences."""

from collections.abc import Mapping

SDXL = (
    "what SDXL is told of the picture's size, as in diffusers: an array of two numbers of pixels, along the height and "
    "along the width. Other models refuse them"
)
NO_EFFECT = "OpenAI's values that ask for nothing beyond what happens anyway"

DESCRIPTIONS: Mapping[str, str] = {
    "prompt": "what to draw. A prompt longer than the text encoder reads (77 tokens in Stable Diffusion) is cut, and "
    "`prompt_truncated` says so",
    "negative_prompt": "what to avoid. Empty, it is zeros instead of an encoded text where the checkpoint says "
    "`force_zeros_for_empty_prompt`, as SDXL does",
    "seed": "an integer from 0 to 4294967295. The same request with the same seed draws the same picture. The answer "
    "tells the seed",
    "num_inference_steps": "denoising steps, as in diffusers",
    "guidance_scale": "strength of classifier-free guidance; 1 and below is none, and costs half",
    "sampler": "the update rule of the denoising steps",
    "size": "one of the declared sizes, such as `512x512`, or `auto`",
    **dict.fromkeys(("original_size", "crops_coords_top_left", "target_size"), SDXL),
    "n": "pictures in one answer, with seeds `seed`, `seed` + 1, ...",
    "timeout": "seconds that the answer may take. What cannot meet it is refused at once",
    "stream": "server-sent events instead of one answer; `n` must be 1",
    "partial_images": "with `stream`, previews of the unfinished picture, up to `limits.partial_images`",
    "progress": "with `stream`, events that tell the place in the queue, the steps taken and the seconds left",
    "output_format": "`png`, `webp` or `jpeg`",
    "output_compression": "quality of WebP and JPEG, 0 to 100; a PNG takes 100 only",
    "model": "its id or one of the operator's `aliases`; any other is 404 `model_not_found`",
    "quality": "`auto` and `standard` change nothing; `low`, `medium`, `high` and `hd` ask for the operator's "
    "`qualities`, numbers of steps. `num_inference_steps` goes before it",
    "response_format": "`b64_json`, or `url` for pictures behind URLs that expire; a job has `url` only",
    "async": "answers 202 with a job, which goes on when the connection ends",
    "webhook_url": "with `async`, an https URL at one of the operator's `jobs.webhook_hosts`, told when the job ends",
    **dict.fromkeys(("user", "safety_identifier"), "accepted and not used"),
    "image": "the picture to edit, or up to `limits.input_images` of them: PNG, JPEG or WebP",
    "images": "the same in JSON: an array of objects with an `image_url`, which is a `data:` URL or one of the "
    "operator's `image_hosts`",
    "mask": "a picture of the same size. What is transparent in it is redrawn, and the rest stays",
    "strength": "how much of the picture is redrawn, above 0 and at most 1: the share of the steps that is taken",
    "input_fidelity": "`low`, which changes nothing: `strength` says how much of the picture stays",
    **dict.fromkeys(("background", "complexity", "moderation", "style"), NO_EFFECT),
}
