{{/* Made by scripts/write_chart.py from operator/baton_operator/kinds.py; change it there. */}}
{{- define "baton.rules" -}}
# what is asked for; only its status is written
- apiGroups: [serving.baton.dev]
  resources: [llmservices]
  verbs: [list, watch]
- apiGroups: [serving.baton.dev]
  resources: [llmservices/status]
  verbs: [patch]
# replicas of a pool; it goes with its service
- apiGroups: [serving.baton.dev]
  resources: [llmpools]
  verbs: [list, watch, get, create, patch]
- apiGroups: [serving.baton.dev]
  resources: [llmpools/status]
  verbs: [patch]
# workers of each revision, gateway, Redis
- apiGroups: [apps]
  resources: [deployments]
  verbs: [list, watch, get, create, patch, delete]
# the API, worker addresses, Redis
- apiGroups: ['']
  resources: [services]
  verbs: [list, watch, get, create, patch, delete]
# the serving revision, read by the gateways
- apiGroups: ['']
  resources: [configmaps]
  verbs: [list, watch, get, create, patch]
# identities
- apiGroups: ['']
  resources: [serviceaccounts]
  verbs: [list, watch, get, create, patch]
# who may reach which pod
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, watch, get, create, patch, delete]
# evictions one by one
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, watch, get, create, patch]
# spec.gateway.ingress
- apiGroups: [networking.k8s.io]
  resources: [ingresses]
  verbs: [list, watch, get, create, patch, delete]
# spec.gateway.httpRoute
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [list, watch, get, create, patch, delete]
# spec.gateway.httpRoute.backend
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [list, watch, get, create, patch, delete]
# Prometheus
- apiGroups: [monitoring.coreos.com]
  resources: [servicemonitors]
  verbs: [list, watch, get, create, patch, delete]
# a service's own secrets: drawn once; the one of its gateways is shown to them
- apiGroups: ['']
  resources: [secrets]
  verbs: [get, create, delete]
# why one does not start: listed while a pool or gateway lacks some
- apiGroups: ['']
  resources: [pods]
  verbs: [list]
# addresses of the gateways
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
# what was done, on the LLMService
- apiGroups: ['']
  resources: [events]
  verbs: [create]
{{- end }}
