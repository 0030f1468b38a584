{{/* Parts of the head's and the workers' pods. */}}

{{- define "m3serve.env" -}}
{{- $drain := include "m3serve.drain" . | fromYaml -}}
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ $drain.rayDrain | quote }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if .Values.haproxy.enabled }}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
- name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
  value: {{ $drain.haproxyHardStop | quote }}
- name: RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S
  value: {{ max 3600 (int64 $drain.haproxyHardStop) | quote }}
- name: RAY_SERVE_HAPROXY_MAXCONN
  value: {{ .Values.haproxy.maxConnections | int64 | quote }}
- name: RAY_SERVE_HAPROXY_NBTHREAD
  value: {{ .Values.haproxy.threads | int64 | quote }}
- name: RAY_SERVE_HAPROXY_METRICS_PORT
  value: {{ .Values.haproxy.metricsPort | int64 | quote }}
- name: RAY_SERVE_HAPROXY_STATS_PORT
  value: {{ .Values.haproxy.statsPort | int64 | quote }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Takes the pod's values. */}}
{{- define "m3serve.probes" -}}
{{- range $name := list "readinessProbe" "livenessProbe" "startupProbe" }}
{{- with index $ $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Takes the pod's values. */}}
{{- define "m3serve.scheduling" -}}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with index $ $name }}
{{- if kindIs "string" . }}
{{ $name }}: {{ . }}
{{- else }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "m3serve.podCommon" -}}
serviceAccountName: {{ include "m3serve.serviceAccountName" . }}
terminationGracePeriodSeconds: {{ (include "m3serve.drain" . | fromYaml).podTermination }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "m3serve.servePorts" -}}
- containerPort: {{ .Values.http.port }}
  name: serve
- containerPort: 8080
  name: metrics
{{- if .Values.haproxy.enabled }}
- containerPort: {{ .Values.haproxy.metricsPort }}
  name: haproxy-metrics
{{- end }}
{{- end -}}

{{/* Security of the workers' Ray container: the common one, and workerCapabilities. */}}
{{- define "m3serve.workerSecurityContext" -}}
{{- $context := deepCopy .Values.containerSecurityContext -}}
{{- with .Values.workerCapabilities -}}
{{- $_ := set $context "capabilities" (merge (dict "add" .) ($context.capabilities | default dict)) -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "m3serve.weightsVolume" -}}
{{- $weights := .Values.model.weights -}}
name: weights
{{- if eq $weights.source "hostPath" }}
hostPath:
  path: {{ $weights.hostPath.path }}
  type: {{ $weights.hostPath.type }}
{{- else if and (eq $weights.source "download") (eq $weights.download.into "emptyDir") }}
emptyDir:
  sizeLimit: {{ $weights.download.sizeLimit }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ $weights.pvc.claimName }}
  readOnly: {{ eq $weights.source "pvc" }}
{{- end }}
{{- end -}}

{{/* Takes the root and whether it may be written. */}}
{{- define "m3serve.weightsMount" -}}
{{- $weights := .root.Values.model.weights -}}
name: weights
mountPath: {{ $weights.mountPath }}
readOnly: {{ not .writable }}
{{- if and $weights.pvc.subPath (or (eq $weights.source "pvc") (eq $weights.download.into "pvc")) (ne $weights.source "hostPath") }}
subPath: {{ $weights.pvc.subPath }}
{{- end }}
{{- end -}}

{{- define "m3serve.downloadContainer" -}}
{{- $download := .Values.model.weights.download -}}
name: download
image: {{ $download.image | default (include "m3serve.image" .) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- range $name := list "command" "args" "env" "envFrom" }}
{{- with index $download $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
resources:
  {{- toYaml $download.resources | nindent 2 }}
volumeMounts:
  - {{ include "m3serve.weightsMount" (dict "root" . "writable" true) | nindent 4 | trim }}
{{- end -}}

{{/* Reads what the processes of the Ray container leave in the shared directory. */}}
{{- define "m3serve.exporterContainer" -}}
{{- $exporter := .Values.monitoring.exporter -}}
name: metrics
image: {{ include "m3serve.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command:
  - python
  - -m
  - service.exporter
  - --dir
  - {{ $exporter.directory }}
  - --host
  - 0.0.0.0
  - --port
  - {{ $exporter.port | int64 | quote }}
ports:
  - containerPort: {{ $exporter.port }}
    name: m3-metrics
livenessProbe:
  httpGet:
    path: /metrics
    port: m3-metrics
  periodSeconds: 60
  timeoutSeconds: 10
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
resources:
  {{- toYaml $exporter.resources | nindent 2 }}
volumeMounts:
  - name: metrics-shm
    mountPath: {{ $exporter.directory }}
{{- end -}}
