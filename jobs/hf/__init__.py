"""Models as Hugging Face keeps them: in from a folder of DeepseekForCausalLM, and out to one."""
