"""Run the Transformers example of the web's Llama guides with Puna: only the import lines are different.

python examples/transformers_style.py [FOLDER, .gguf file, or cria]
"""

import sys

import torch

from puna import AutoModelForCausalLM, AutoTokenizer

model_id = sys.argv[1] if len(sys.argv) > 1 else "cria"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, device_map="auto")

messages = [{"role": "user", "content": "What do llamas eat?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
outputs = model.generate(inputs, max_new_tokens=128)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))

# A batch: shorter prompts are filled up on the left, and every row continues as it would alone.
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
batch = tokenizer(["Llamas are", "The puna is a high"], padding=True, return_tensors="pt")
outputs = model.generate(**batch, max_new_tokens=16)
for text in tokenizer.batch_decode(outputs, skip_special_tokens=True):
    print(text)
