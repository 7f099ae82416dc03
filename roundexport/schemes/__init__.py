"""Which weight gets which bits: rules, the plan, sensitivities, and a budget spread over layers."""
