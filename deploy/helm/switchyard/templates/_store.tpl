{{/* Where the experts are: variables of the server. A password is put into the URL by the kubelet, and stands nowhere. */}}
{{- define "switchyard.store" -}}
{{- if .Values.redis.enabled -}}
{{- $host := printf "%s-redis:6379/0" (include "switchyard.fullname" .) -}}
{{- if .Values.redis.existingSecret -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.key }}
- name: SWITCHYARD_STORE
  value: redis://:$(REDIS_PASSWORD)@{{ $host }}
{{- else -}}
- name: SWITCHYARD_STORE
  value: redis://{{ $host }}
{{- end -}}
{{- else if .Values.redis.external.existingSecret -}}
- name: SWITCHYARD_STORE
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.external.existingSecret }}
      key: {{ .Values.redis.external.key }}
{{- else -}}
- name: SWITCHYARD_STORE
  value: {{ .Values.redis.external.url | quote }}
{{- end -}}
{{- end -}}
